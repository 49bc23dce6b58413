"""Looks at a run for everybody who watches it: metrics as they are written, kept groups, status, facts.

Promises
- However many watch, there is one reader of the metrics, one lister of the groups, one who asks the queue;
  nobody asks it while nobody looks.
- A queue that does not answer is told as that, with the time it was asked; the rest goes on.
- Nothing here blocks the event loop: files and the queue are asked in threads.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import dataclass
from typing import Any

import redis

from services.config import Config
from services.config_file import ConfigError
from services.formatting import reason
from services.queue_connection import QueueUnreachable
from services.report.curves import time_breakdowns
from services.run_directory import RunDirectory
from services.status import RunStatus, status_with
from services.telemetry import METRICS_FILE
from services.ui.facts import facts_of
from services.ui.gallery import Gallery
from services.ui.tail import Cursor, MetricsTail

log = logging.getLogger(__name__)

ROWS_S = 0.5
GROUPS_S = 2.0
STATUS_S = 2.0
LOOKED_S = 30.0
"""So long after somebody has asked, somebody counts as looking."""


@dataclass(frozen=True)
class Look:
    """What there is to be told, at one moment; what differs from an earlier look is news."""

    cursor: Cursor
    told: int
    groups: int
    status: int
    reading: int | None
    """Percent of the metrics that are read, while the first reading goes on."""


class Watch:
    """One run, looked at."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.config, self.config_error = _config(run)
        self.tail = MetricsTail(run.root / METRICS_FILE)
        self.gallery = Gallery(run.samples, self.config)
        self.closed = False
        self._caught_up = False
        self._groups = self._status = 0
        self._answer: dict[str, Any] = {"status": None, "problem": "", "asked": None}
        self._facts: tuple[Cursor, dict[str, Any]] | None = None
        self._looked = asyncio.Event()
        self._looked_at = -LOOKED_S
        self._news = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        works = (self._follow_rows, self._follow_groups, self._follow_status)
        self._tasks = [asyncio.create_task(self._for_ever(work), name=work.__name__) for work in works]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._close()

    def close_soon(self) -> None:
        """End all streams; from any thread, or a signal handler."""
        if self._loop is not None and not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._close(), self._loop)

    async def _close(self) -> None:
        self.closed = True
        await self._tell()

    def looked_at(self) -> None:
        """Somebody is there: the queue is asked again."""
        self._looked_at = time.monotonic()
        self._looked.set()

    def look(self) -> Look:
        reading = None if self._caught_up else 100 * self.tail.bytes_read // max(self.tail.size, 1)
        return Look(self.tail.cursor, self.tail.told, self._groups, self._status, reading)

    async def news_since(self, look: Look, timeout_s: float) -> bool:
        """Wait until there is something new; False where nothing was in that time."""
        try:
            async with asyncio.timeout(timeout_s), self._news:
                await self._news.wait_for(lambda: self.closed or self.look() != look)
        except TimeoutError:
            return False
        return True

    def told_status(self) -> dict[str, Any]:
        """The last answer of the run's queue and directory, and what the rows say."""
        return {**self._answer, "now": time.time(), **self.facts()}

    def facts(self) -> dict[str, Any]:
        """How far the run has come, from its rows; counted once for all who ask."""
        cursor = self.tail.cursor
        if self._facts is None or self._facts[0] != cursor:
            self._facts = cursor, facts_of(self.tail, self.config)
        return self._facts[1]

    def times(self) -> list[dict[str, Any]]:
        """Where the time of the newest updates went."""
        return [
            {
                "title": found.title,
                "seconds": found.seconds,
                "note": found.note,
                "shares": [
                    {"name": one.name, "seconds": one.seconds, "share": one.share, "tone": one.tone}
                    for one in found.shares
                ],
            }
            for found in time_breakdowns(self.tail.recent())
        ]

    async def _for_ever(self, work: Any) -> None:
        while True:
            try:
                await work()
            except Exception as error:
                # A shared file system has such moments, another version writes other rows: the rest goes on.
                log.warning("%s: %s", self.run.root, reason(error), exc_info=not isinstance(error, OSError))
                await asyncio.sleep(STATUS_S)

    async def _follow_rows(self) -> None:
        while True:
            more = await asyncio.to_thread(self.tail.read_some)
            self._caught_up = self._caught_up or not more
            await self._tell()
            if not more:
                await asyncio.sleep(ROWS_S)

    async def _follow_groups(self) -> None:
        while True:
            if await asyncio.to_thread(self.gallery.refresh):
                self._groups += 1
                await self._tell()
            await asyncio.sleep(GROUPS_S)

    async def _follow_status(self) -> None:
        while True:
            if time.monotonic() - self._looked_at > LOOKED_S:
                self._looked.clear()
            await self._looked.wait()
            answer = await asyncio.to_thread(self._ask)
            if answer != {**self._answer, "asked": answer["asked"]}:
                self._status += 1
            self._answer = answer
            await self._tell()
            await asyncio.sleep(STATUS_S)

    def _ask(self) -> dict[str, Any]:
        recent, evals = self.tail.recent(), self.tail.evals()
        try:
            found = status_with(
                self.run, update=recent[-1] if recent else None, evaluation=evals[-1] if evals else None
            )
        except (ConfigError, QueueUnreachable) as error:
            return {"status": None, "problem": str(error), "asked": time.time()}
        except Exception as error:
            # Of a run of another version, say: what was true before is not shown as if it still were.
            if not isinstance(error, redis.RedisError):
                log.warning("%s: its status", self.run.root, exc_info=True)
            return {"status": None, "problem": reason(error), "asked": time.time()}
        return {"status": _told(found), "problem": "", "asked": time.time()}

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()


def _told(status: RunStatus) -> dict[str, Any]:
    """What the rows do not say."""
    told: dict[str, Any] = json.loads(status.model_dump_json(exclude={"update", "evaluation"}))
    told["workers"] = status.workers
    return told


def _config(run: RunDirectory) -> tuple[Config | None, str]:
    try:
        return run.config(), ""
    except ConfigError as error:
        return None, str(error)
