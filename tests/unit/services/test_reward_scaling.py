"""`dgpo scale --replicas`, from the wish in the queue to the call of Serve."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from services.reward_scaling import RewardScaling, Told

DEADLINE_S = 10.0


def until(scaling: RewardScaling, wanted: dict[str, int], done: Callable[[list[Told]], bool]) -> list[Told]:
    told: list[Told] = []
    give_up = time.monotonic() + DEADLINE_S
    while not done(told):
        assert time.monotonic() < give_up, told
        told += scaling.turn(wanted)
    return told


def test_what_is_wanted_is_asked_for_once_and_told() -> None:
    calls: list[tuple[str, int]] = []
    scaling = RewardScaling(lambda name, count: calls.append((name, count)))
    assert list(scaling.turn({})) == []
    until(scaling, {"ocr": 3, "jpeg": 1}, lambda told: len(told) == 2)
    told = until(scaling, {"ocr": 2, "jpeg": 1}, lambda told: len(told) == 1)
    assert calls == [("ocr", 3), ("jpeg", 1), ("ocr", 2)]
    assert told == [Told("reward scaled", "ocr: 2 replicas asked for", failed=False)]
    assert scaling.asked == {"ocr": 2, "jpeg": 1}
    assert list(scaling.turn({"ocr": 2, "jpeg": 1})) == [] and len(calls) == 3


def test_a_try_that_fails_is_told_and_made_again() -> None:
    tries: list[int] = []

    def scale(name: str, count: int) -> None:
        tries.append(count)
        if len(tries) < 3:
            raise ValueError(f"reward {name!r} was not started here")

    scaling = RewardScaling(scale, again_s=0.05)
    told = until(scaling, {"ocr": 3}, lambda told: bool(told) and not told[-1].failed)
    assert tries == [3, 3, 3]
    assert [one.what for one in told] == ["reward not scaled", "reward not scaled", "reward scaled"]
    assert "ocr keeps its replicas: ValueError: reward 'ocr' was not started here" in told[0].detail


def test_one_that_always_fails_keeps_no_other_waiting() -> None:
    def scale(name: str, count: int) -> None:
        if name == "ocr":
            raise ValueError("no room")

    scaling = RewardScaling(scale, again_s=DEADLINE_S)
    told = until(scaling, {"ocr": 3, "jpeg": 2}, lambda told: len(told) == 2)
    assert [one.failed for one in told] == [True, False] and scaling.asked == {"jpeg": 2}


def test_nobody_waits_for_a_serve_that_does_not_answer() -> None:
    answers = threading.Event()
    scaling = RewardScaling(lambda name, count: answers.wait(DEADLINE_S) and None)
    began = time.monotonic()
    for _ in range(5):
        assert list(scaling.turn({"ocr": 3})) == []
    assert time.monotonic() - began < DEADLINE_S / 2
    answers.set()
    until(scaling, {"ocr": 3}, lambda told: len(told) == 1)
