"""Experiment trackers beside metrics.jsonl: Weights & Biases, MLflow, trackio (`telemetry.tracker`).

Promises
- The same curves as in TensorBoard, held-out scores among them, against the number of updates; the
  configuration without anything secret. A resumed run goes on in the same run of the tracker.
- Training does not notice: each tracker has a thread of its own, and one that fails logs one warning.
- Nothing is sent but to where the library's own environment variables, or a login that it keeps, say; its
  usage reports are off.
- A package that is missing is told before anything starts (`refuse_unusable_trackers`).

Imports none of the libraries before a run has begun that wants them (services/tracker_libraries.py).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from services.config import Config
from services.config.parts import TrackerName
from services.config_file import ConfigError
from services.formatting import reason
from services.metrics import AnyRow, EvalRow, UpdateRow
from services.run_directory import RunDirectory
from services.scalars import scalars

logger = logging.getLogger(__name__)

HELD_ROWS: Final = 10_000
"""Rows that wait for a slow tracker; later ones are not logged there."""
CLOSE_S: Final = 60.0
"""For what a tracker has not taken when the run ends."""
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://\S+")


class Tracker(Protocol):
    """One run with one library."""

    def log(self, numbers: Mapping[str, float], step: int, time: float) -> None: ...

    def finish(self, *, failed: bool) -> None: ...


def missing(name: TrackerName) -> str | None:
    """What a tracker lacks on this machine, and how it is had; None: nothing."""
    if importlib.util.find_spec(name) is None:
        return f"the package {name} is not installed: pip install 'dgpo-cluster[{name}]'"
    if name == "mlflow" and not _named("MLFLOW_TRACKING_URI") and not _has("sqlalchemy"):
        return (
            "mlflow-skinny has no store of its own: set MLFLOW_TRACKING_URI to a server's, or "
            "pip install mlflow"
        )
    return None


def refuse_unusable_trackers(config: Config) -> None:
    """Raises:
    ConfigError: a tracker of the configuration lacks its package.
    """
    for name in config.telemetry.trackers:
        if why := missing(name):
            raise ConfigError(f"telemetry.tracker {name}: {why}")


@contextmanager
def tracker_sinks(config: Config, run: RunDirectory) -> Iterator[list[TrackerSink]]:
    """The run's trackers, for Telemetry; they are told at the end of the block how it ended."""
    from services.tracker_libraries import open_tracker

    facts = flat(config.model_dump(mode="json"))
    sinks = [
        TrackerSink(name, partial(open_tracker, name, run, config.run.name, facts))
        for name in config.telemetry.trackers
    ]
    failed = True
    try:
        yield sinks
        failed = False
    finally:
        for sink in sinks:
            sink.close(failed=failed)


class TrackerSink:
    """Rows to a tracker, in a thread of its own."""

    def __init__(self, name: str, open_: Callable[[], Tracker]) -> None:
        self._name = name
        self._open = open_
        self._rows: queue.Queue[UpdateRow | EvalRow | None] = queue.Queue(HELD_ROWS)
        self._failed = False
        self._warned = False
        # A library that waits for its server must not keep the driver from ending.
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def add(self, row: AnyRow) -> None:
        if not isinstance(row, UpdateRow | EvalRow) or not self._thread.is_alive():
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._warn(f"it takes no rows: {HELD_ROWS} wait for it, later ones are left out")

    def close(self, *, failed: bool) -> None:
        """Give what waits `CLOSE_S`, then let it be."""
        self._failed = failed
        if self._thread.is_alive():
            give_up = time.monotonic() + CLOSE_S
            try:
                self._rows.put(None, timeout=CLOSE_S)
            except queue.Full:
                return
            self._thread.join(max(0.0, give_up - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"it has not taken everything within {CLOSE_S:g} s of the end of the run")

    def _run(self) -> None:
        try:
            tracker = self._open()
        except BaseException as error:  # libraries end the process where they find no login
            self._warn(reason(error))
            return
        while (row := self._rows.get()) is not None:
            numbers = {name: value for name, value in scalars(row).items() if value is not None}
            try:
                tracker.log(numbers, row.step, row.time)
            except BaseException as error:
                self._warn(reason(error))
        try:
            tracker.finish(failed=self._failed)
        except BaseException as error:
            self._warn(reason(error))

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("tracker %s: %s; the run goes on, metrics.jsonl has every row", self._name, why)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """A configuration as `section.key` -> what is there; of addresses no user, password or query.

    >>> flat({"queue": {"url": "redis://a:b@host:1/0?x=1"}, "rewards": [{"name": "ocr"}]})
    {'queue.url': 'redis://host:1/0', 'rewards.0.name': 'ocr'}
    """
    if isinstance(value, Mapping) or (isinstance(value, list) and value):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        found: dict[str, Any] = {}
        for key, inner in items:
            found |= flat(inner, f"{name}.{key}" if name else str(key))
        return found
    return {name: _ADDRESS.sub(_bare, value) if isinstance(value, str) else value}


def _bare(address: re.Match[str]) -> str:
    parts = urlsplit(address.group())
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _named(variable: str) -> bool:
    return bool(os.environ.get(variable))


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
