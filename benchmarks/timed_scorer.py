"""A scorer that waits instead of looking: what is around a scorer is measured with it, on any machine.

Served by its import path, `benchmarks.timed_scorer:create`, as scorers of other packages are. Each score says
which process has made it, and how often that one has scored its `metadata["id"]`: to a client that asks once,
that must be once.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from pydantic import Field

from reward_servers.scorer import ItemScore, Scorer, ScorerOptions
from reward_servers.wire import ScoreCall

TIMED: Final = "benchmarks.timed_scorer:create"


class TimedOptions(ScorerOptions):
    """Arguments of the timed scorer."""

    neutral: ClassVar[frozenset[str]] = frozenset({"image_s", "max_batch", "slow"})

    image_s: float = Field(default=0.05, ge=0)
    """Seconds it waits an image."""
    max_batch: int = Field(default=4, ge=1)
    """Images it takes at once."""
    slow: Path | None = None
    """A file: who makes it, the first of several replicas, waits twice as long."""


def create(args: dict[str, Any], threads: int) -> TimedScorer:
    return TimedScorer(TimedOptions.model_validate(args))


class TimedScorer(Scorer):
    name = "timed"
    version = "1"
    batch_invariant = True

    def __init__(self, options: TimedOptions) -> None:
        self.options = options
        self.max_batch = options.max_batch
        self.model = f"a wait of {options.image_s:g} s an image"
        self._image_s = options.image_s
        if options.slow is not None and _made(options.slow):
            self._image_s *= 2
        self._times: Counter[str] = Counter()

    def score(self, call: ScoreCall) -> Sequence[ItemScore]:
        time.sleep(self._image_s * len(call))
        items = []
        for image, metadata in zip(call.images, call.metadata, strict=True):
            name = str(metadata.get("id", ""))
            self._times[name] += 1
            details = {"id": name, "times": self._times[name], "total": self._times.total()}
            details["process"] = os.getpid()
            items.append(ItemScore(float(image.mean()), details))
        return items

    def warm_up(self) -> None:
        pass


def _made(file: Path) -> bool:
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
