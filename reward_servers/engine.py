"""Runs one scorer: off the event loop, one call at a time, under a deadline, with a bounded queue.

Promises
- `score` returns one ItemScore an image, each a finite score or an error, or raises ProtocolError; it never
  waits longer than `deadline_s`.
- With batching `request` the images of a request are scored by themselves. With `dynamic` the requests that
  wait while the scorer is busy are merged, counted in images; nobody waits for company that has not come.
- No more than `max_pending` requests are held, counted from before their bodies are read; the next one is
  refused with 429 before any work.
- A scorer that raises on merged requests is asked again for each alone: a bad request fails by itself. Where
  it raises ProtocolError, which is no fault of a request, all of them fail with that.
- Whatever a scorer raises, an exit or a panic of a library included, fails its requests and nothing else.
- A scorer that hangs makes `stalled` say so, and whoever watches (Serve's health check) starts a new process.
  It does not keep this one from ending.
  Each call of the scorer is timed by itself: many that are slow or fail are no hang.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from queue import SimpleQueue

from reward_servers.protocol import ProtocolError
from reward_servers.scorer import ItemScore, Scorer
from reward_servers.wire import ScoreCall

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job:
    call: ScoreCall
    answer: asyncio.Future[list[ItemScore]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class ScoringEngine:
    """One scorer and the requests that wait for it; all but `stalled` belongs to one event loop.

    A request takes a place, then is read and scored: `with engine.admitted(): await engine.score(call)`.
    """

    def __init__(self, scorer: Scorer, *, merge: bool, deadline_s: float, max_pending: int) -> None:
        self.scorer = scorer
        self._merge = merge
        self._deadline_s = deadline_s
        self._max_pending = max_pending
        self._waiting: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._pending = 0
        self._busy_since: float | None = None
        self._work: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = SimpleQueue()
        self._loop_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Warm the scorer up, then take requests."""
        # No executor: a scorer that hangs in one of its threads would keep the process from ending.
        threading.Thread(target=self._work_off, name=f"scorer-{self.scorer.name}", daemon=True).start()
        await self._in_thread(self.scorer.warm_up)
        self._loop_task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Refuse what waits. A call that the scorer has begun is not waited for."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        for job in self._waiting:
            _fail(job, ProtocolError(503, "the server is shutting down", retry_after_s=1))
        self._work.put(None)

    @property
    def stalled(self) -> str | None:
        """What hangs, if the scorer has been in one call for longer than the deadline."""
        since = self._busy_since
        if since is None or time.monotonic() - since <= self._deadline_s:
            return None
        return f"scorer {self.scorer.name!r} has not answered for {time.monotonic() - since:.0f} s"

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """One of the `max_pending` places, for as long as the block lasts; taken before a body is read.

        Raises:
            ProtocolError: the scorer hangs (503), or every place is taken (429).
        """
        if stalled := self.stalled:
            raise ProtocolError(503, stalled, retry_after_s=5)
        if self._pending >= self._max_pending:
            raise ProtocolError(
                429, f"{self._pending} requests wait already; at most {self._max_pending}", retry_after_s=1
            )
        self._pending += 1
        try:
            yield
        finally:
            self._pending -= 1

    async def score(self, call: ScoreCall) -> list[ItemScore]:
        """Scores of an admitted request, in order."""
        job = _Job(call)
        self._waiting.append(job)
        self._arrived.set()
        try:
            async with asyncio.timeout(self._deadline_s):
                return await job.answer
        except TimeoutError:
            place = "waited for" if job in self._waiting else "was in"
            raise ProtocolError(
                504,
                f"{len(call)} images: no score within {self._deadline_s:g} s; the request {place} the scorer",
            ) from None
        finally:
            job.answer.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            jobs = self._next_jobs()
            if not jobs:
                self._arrived.clear()
                continue
            try:
                await self._in_thread(partial(self._answer, loop, jobs))
            except Exception as error:
                # Not the scorer's: _answer hands those on. The loop must outlive it all the same.
                log.exception("scoring failed", extra={"reward": self.scorer.name})
                for job in jobs:
                    _fail(job, error)

    async def _in_thread(self, work: Callable[[], None]) -> None:
        done: Future[None] = Future()
        self._work.put((work, done))
        await asyncio.wrap_future(done)

    def _work_off(self) -> None:
        """The scorer's thread."""
        while (given := self._work.get()) is not None:
            work, done = given
            if not done.set_running_or_notify_cancel():
                continue
            try:
                work()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    def _next_jobs(self) -> list[_Job]:
        """The next request, and with `merge` those behind it that fit in one batch, in order."""
        jobs: list[_Job] = []
        images = 0
        while self._waiting:
            job = self._waiting[0]
            if job.answer.done():
                self._waiting.popleft()
                continue
            if jobs and (not self._merge or images + len(job.call) > self.scorer.max_batch):
                break
            jobs.append(self._waiting.popleft())
            images += len(job.call)
        return jobs

    def _answer(self, loop: asyncio.AbstractEventLoop, jobs: list[_Job]) -> None:
        """In the scorer's thread."""
        try:
            items = iter(self._score([job.call for job in jobs]))
        except BaseException as error:  # sys.exit() and Rust's panics are no Exception
            if len(jobs) > 1 and not isinstance(error, ProtocolError):
                for job in jobs:
                    # Who has given up meanwhile, at the deadline or gone, is not scored any more.
                    if not job.answer.done():
                        self._answer(loop, [job])
                return
            log.exception("scorer failed", extra={"reward": self.scorer.name})
            for job in jobs:
                loop.call_soon_threadsafe(_fail, job, error)
            return
        for job in jobs:
            loop.call_soon_threadsafe(_resolve, job, list(islice(items, len(job.call))))

    def _score(self, calls: Sequence[ScoreCall]) -> list[ItemScore]:
        merged = ScoreCall(
            [image for call in calls for image in call.images],
            [prompt for call in calls for prompt in call.prompts],
            [metadata for call in calls for metadata in call.metadata],
        )
        items: list[ItemScore] = []
        for start in range(0, len(merged), self.scorer.max_batch):
            chosen = slice(start, start + self.scorer.max_batch)
            part = ScoreCall(merged.images[chosen], merged.prompts[chosen], merged.metadata[chosen])
            self._busy_since = time.monotonic()
            try:
                scored = self.scorer.score(part)
            finally:
                self._busy_since = None
            if len(scored) != len(part):
                raise RuntimeError(f"scorer returned {len(scored)} scores for {len(part)} images")
            items += [_finite(item) for item in scored]
        return items


def _finite(item: ItemScore) -> ItemScore:
    """A score, or an error that says why there is none."""
    if item.error is not None:
        return ItemScore(None, item.details, item.error)
    if item.score is None or not math.isfinite(item.score):
        return ItemScore(None, item.details, f"the scorer gave {item.score}, which is no score")
    return ItemScore(float(item.score), item.details)


def _resolve(job: _Job, items: list[ItemScore]) -> None:
    if not job.answer.done():
        job.answer.set_result(items)


def _fail(job: _Job, error: BaseException) -> None:
    if job.answer.done():
        return
    if not isinstance(error, ProtocolError):
        error = ProtocolError(500, f"the scorer raised {type(error).__name__}: {error}")
    job.answer.set_exception(error)
