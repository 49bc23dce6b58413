"""How requests share one scorer: units or merged, bounded, under a deadline, none failing for another."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from reward_servers.engine import ScoringEngine
from reward_servers.protocol import ProtocolError
from reward_servers.wire import ScoreCall


def call(*prompts: str) -> ScoreCall:
    images = [np.full((2, 2, 3), index, np.uint8) for index in range(len(prompts))]
    return ScoreCall(images, prompts, [{}] * len(prompts))


@asynccontextmanager
async def running(scorer: Any, **settings: Any) -> AsyncIterator[ScoringEngine]:
    engine = ScoringEngine(scorer, **({"merge": False, "deadline_s": 20.0, "max_pending": 8} | settings))
    await engine.start()
    try:
        yield engine
    finally:
        scorer.released.set()
        await engine.stop()


async def ask(engine: ScoringEngine, call: ScoreCall) -> list[Any]:
    """As the application does."""
    with engine.admitted():
        return await engine.score(call)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (what it waits for has no event)
            await asyncio.sleep(0.001)


async def waiting_behind_a_hang(engine: ScoringEngine, *calls: ScoreCall) -> list[asyncio.Task[Any]]:
    """Tasks of `calls`, all queued while the scorer is busy with another."""
    busy = asyncio.create_task(ask(engine, call("hang")))
    await until(engine.scorer.entered.is_set)  # type: ignore[attr-defined]
    tasks = [busy]
    for each in calls:
        tasks.append(asyncio.create_task(ask(engine, each)))
        await asyncio.sleep(0)
    return tasks


async def test_it_is_warm_when_it_starts(fake: Any) -> None:
    async with running(fake):
        assert fake.warm


async def test_scores_in_order(fake: Any) -> None:
    async with running(fake) as engine:
        items = await ask(engine, call(*"abcdef"))
    assert [item.score for item in items] == [0, 1, 2, 3, 4, 5]
    assert fake.calls == [list("abcd"), list("ef")], "no more than max_batch at once"


async def test_a_request_is_a_unit(fake: Any) -> None:
    async with running(fake) as engine:
        tasks = await waiting_behind_a_hang(engine, call("a"), call("b", "c"), call("d"))
        fake.released.set()
        await asyncio.gather(*tasks)
    assert fake.calls == [["hang"], ["a"], ["b", "c"], ["d"]]


async def test_dynamic_merges_what_waits_up_to_max_batch_images(fake: Any) -> None:
    async with running(fake, merge=True) as engine:
        tasks = await waiting_behind_a_hang(engine, call("a"), call("b", "c"), call("d", "e"), call("f"))
        fake.released.set()
        answers = await asyncio.gather(*tasks)
    assert fake.calls == [["hang"], ["a", "b", "c"], ["d", "e", "f"]]
    assert [[item.details["prompt"] for item in items] for items in answers] == [
        ["hang"], ["a"], ["b", "c"], ["d", "e"], ["f"]
    ]  # fmt: skip


async def test_a_request_that_raises_fails_alone(fake: Any) -> None:
    async with running(fake, merge=True) as engine:
        tasks = await waiting_behind_a_hang(engine, call("a"), call("raise"), call("b"))
        fake.released.set()
        _, first, failed, last = await asyncio.gather(*tasks, return_exceptions=True)
        assert (await ask(engine, call("after")))[0].score == 0
    assert (first[0].score, last[0].score) == (0, 0)
    assert isinstance(failed, ProtocolError) and failed.status == 500
    assert "ArithmeticError: asked to raise" in failed.detail


async def test_a_refusal_of_the_scorer_itself_is_no_fault_of_a_request(
    fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(call: ScoreCall) -> Any:
        fake.calls.append(list(call.prompts))
        raise ProtocolError(503, "the judge is away", retry_after_s=2)

    async with running(fake, merge=True) as engine:
        busy, *tasks = await waiting_behind_a_hang(engine, call("a"), call("b"))
        monkeypatch.setattr(fake, "score", unavailable)
        fake.released.set()
        _, *failed = await asyncio.gather(busy, *tasks, return_exceptions=True)
    assert [(type(error), error.status) for error in failed] == [(ProtocolError, 503)] * 2
    assert fake.calls == [["hang"], ["a", "b"]], "not asked again for each"


async def test_who_has_left_is_not_asked_for_again(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, entered, go_on = fake.score, threading.Event(), threading.Event()

    def pausing(given: ScoreCall) -> Any:
        if len(given) == 2:
            entered.set()
            assert go_on.wait(20)
        return inner(given)

    async with running(fake, merge=True) as engine:
        busy, left, stays = await waiting_behind_a_hang(engine, call("left"), call("raise"))
        monkeypatch.setattr(fake, "score", pausing)
        fake.released.set()
        await until(entered.is_set)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        go_on.set()
        with pytest.raises(ProtocolError, match="asked to raise"):
            await stays
        await busy
    assert fake.calls == [["hang"], ["left", "raise"], ["raise"]]


async def test_many_calls_that_are_slow_and_fail_are_no_hang(
    fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is the scorer's: each call takes 15 s of a deadline of 20 s."""
    now = [0.0]
    stalled: list[str | None] = []

    def slow(given: ScoreCall) -> Any:
        now[0] += 15
        stalled.append(engine.stalled)
        raise ArithmeticError("asked to raise")

    async with running(fake, merge=True) as engine:
        busy, *tasks = await waiting_behind_a_hang(engine, call("a"), call("b"), call("c"))
        # Not time.monotonic itself, which the event loop goes by.
        monkeypatch.setattr("reward_servers.engine.time", SimpleNamespace(monotonic=lambda: now[0]))
        monkeypatch.setattr(fake, "score", slow)
        fake.released.set()
        _, *failed = await asyncio.gather(busy, *tasks, return_exceptions=True)
        assert engine.stalled is None
    assert [type(error) for error in failed] == [ProtocolError] * 3
    assert stalled == [None] * 4, "once together, once each"


async def test_a_score_that_is_not_finite_is_an_error(fake: Any) -> None:
    async with running(fake) as engine:
        good, nan, error = await ask(engine, call("a", "nan", "error"))
    assert (good.score, good.error) == (0, None)
    assert nan.score is None and "nan" in (nan.error or "")
    assert (error.score, error.error) == (None, "asked for an error")


async def test_too_few_scores_fail_the_request(fake: Any) -> None:
    async with running(fake) as engine:
        with pytest.raises(ProtocolError, match="1 scores for 2 images"):
            await ask(engine, call("few", "a"))


async def test_more_than_max_pending_are_refused_and_the_others_answered(fake: Any) -> None:
    async with running(fake, max_pending=2) as engine:
        tasks = await waiting_behind_a_hang(engine, call("a"))
        with pytest.raises(ProtocolError) as caught:
            await ask(engine, call("b"))
        fake.released.set()
        await asyncio.gather(*tasks)
        await ask(engine, call("c"))
    assert caught.value.status == 429
    assert caught.value.retry_after_s is not None


async def test_a_place_is_held_from_admission_to_the_end_whatever_happens(fake: Any) -> None:
    async with running(fake, max_pending=1) as engine:
        with engine.admitted(), pytest.raises(ProtocolError) as caught:
            await ask(engine, call("a"))
        assert caught.value.status == 429, "nothing was scored yet, but the place was taken"
        with pytest.raises(LookupError), engine.admitted():
            raise LookupError("the body cannot be read")
        with pytest.raises(ProtocolError, match="asked to raise"):
            await ask(engine, call("raise"))
        left = asyncio.create_task(ask(engine, call("hang")))
        await until(fake.entered.is_set)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        fake.released.set()
        assert (await ask(engine, call("b")))[0].score == 0


async def test_a_hang_meets_the_deadline_and_is_reported(fake: Any) -> None:
    async with running(fake, deadline_s=0.05) as engine:
        with pytest.raises(ProtocolError) as caught:
            await ask(engine, call("hang"))
        await until(lambda: engine.stalled is not None)
        with pytest.raises(ProtocolError) as refused:
            await ask(engine, call("a"))
        fake.released.set()
        await until(lambda: engine.stalled is None)
        assert (await ask(engine, call("b")))[0].score == 0, "it goes on when the scorer does"
    assert (caught.value.status, refused.value.status) == (504, 503)
    assert "'fake'" in refused.value.detail


async def test_a_request_whose_client_left_is_not_scored(fake: Any) -> None:
    async with running(fake) as engine:
        busy, left, last = await waiting_behind_a_hang(engine, call("left"), call("last"))
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        fake.released.set()
        await asyncio.gather(busy, last)
    assert fake.calls == [["hang"], ["last"]]


async def test_stopping_refuses_what_waits(fake: Any) -> None:
    engine = ScoringEngine(fake, merge=False, deadline_s=20, max_pending=8)
    await engine.start()
    tasks = await waiting_behind_a_hang(engine, call("a"))
    await engine.stop()
    with pytest.raises(ProtocolError, match="shutting down"):
        await tasks[1]
    tasks[0].cancel()
    fake.released.set()


class Panic(BaseException):
    """As libraries in Rust raise it: no Exception."""


@pytest.mark.parametrize("kind", [SystemExit, Panic, asyncio.CancelledError])
async def test_whatever_a_scorer_raises_fails_its_request_only(
    fake: Any, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    async with running(fake) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(fake, "score", lambda call: (_ for _ in ()).throw(kind("out of order")))
            with pytest.raises(ProtocolError, match=f"{kind.__name__}: out of order"):
                await ask(engine, call("a"))
        assert (await ask(engine, call("b")))[0].score == 0


def test_a_scorer_that_hangs_does_not_keep_its_process() -> None:
    program = """
import asyncio
from reward_servers.engine import ScoringEngine
from tests.unit.reward_servers.fake_scorer import FakeScorer
from tests.unit.reward_servers.test_engine import ask, call

async def main():
    scorer = FakeScorer()
    scorer.released.wait = lambda seconds: __import__("time").sleep(600)
    engine = ScoringEngine(scorer, merge=False, deadline_s=0.1, max_pending=1)
    await engine.start()
    try:
        await ask(engine, call("hang"))
    finally:
        await engine.stop()

asyncio.run(main())
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1 and "no score within 0.1 s" in ended.stderr
