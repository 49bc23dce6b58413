"""The guard against reward hacking: a held-out reward that falls while the trained ones rise.

Promises
- Like is compared with like: evaluations with earlier ones of as many prompts, which are the same prompts,
  and windows of updates with earlier windows.
- Fires once for a reward in a source of scores, and again only after it had recovered.
- A reward is measured against its own best, in its own unit. What was not scored is passed over, never taken
  for 0.

Knows no queue and no Ray: rows in, warnings out. services/monitor.py acts on them.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from services.config import Config
from services.metrics import AnyRow, EvalRow, UpdateRow


@dataclass(frozen=True)
class Point:
    """Mean scores at a step."""

    step: int
    trained: float
    """Weighted sum of the trained rewards."""
    heldout: float


@dataclass(frozen=True)
class Fall:
    """A held-out reward has fallen further than it may."""

    reward: str
    source: str
    best: Point
    now: Point
    allowed: float

    def __str__(self) -> str:
        return (
            f"held-out reward {self.reward!r} fell from {self.best.heldout:.4g} (step {self.best.step}) to "
            f"{self.now.heldout:.4g} in {self.source}, more than guard.drop {self.allowed:g}, while the "
            f"trained rewards rose from {self.best.trained:.4g} to {self.now.trained:.4g}: is it gamed?"
        )


class Guard:
    """Watches the rows of one run.

    >>> from services.config_file import load_config
    >>> from services.metrics import Estimate
    >>> def row(step, **means):
    ...     rewards = {name: Estimate(mean=mean) for name, mean in means.items()}
    ...     return EvalRow(time=0, epoch=0, step=step, prompts=8, rewards=rewards)
    >>> guard = Guard(load_config("quickstart", ["guard.drop={tesseract: 0.1}"]))
    >>> rows = row(0, ocr=0.5, tesseract=0.6), row(1, ocr=0.7, tesseract=0.4)
    >>> [[fall.reward for fall in guard.observe(each)] for each in rows]
    [[], ['tesseract']]
    """

    def __init__(self, config: Config) -> None:
        self._drop = config.guard.drop
        self._window = config.guard.window
        self._trained = config.trained_rewards
        self._updates: list[UpdateRow] = []
        self._best: dict[tuple[str, str], Point] = {}
        self._fallen: set[tuple[str, str]] = set()

    def remember(self, rows: Iterable[AnyRow]) -> None:
        """Rows of a run that is resumed: its bests count, and what had fallen fires again if it still has."""
        for row in rows:
            self.observe(row)
        self._fallen.clear()

    def observe(self, row: AnyRow) -> list[Fall]:
        """What a row of metrics says that was not known yet."""
        if isinstance(row, EvalRow):
            scores = {name: [found.mean] for name, found in row.rewards.items()}
            return list(self._compare(f"evaluations of {row.prompts} prompts", row.step, scores))
        if not isinstance(row, UpdateRow):
            return []
        self._updates.append(row)
        if len(self._updates) < self._window:
            return []
        window, self._updates = self._updates, []
        columns: dict[str, list[float | None]] = defaultdict(list)
        for update in window:
            for name, spread in update.rewards.items():
                columns[name].append(spread.mean)
        return list(self._compare("training groups", row.step, columns))

    def _compare(
        self, source: str, step: int, scores: Mapping[str, Sequence[float | None]]
    ) -> Iterator[Fall]:
        means = {
            name: statistics.fmean(known)
            for name, column in scores.items()
            if (known := [value for value in column if value is not None])
        }
        if any(reward.name not in means for reward in self._trained):
            return
        trained = sum(reward.term(means[reward.name]) for reward in self._trained)
        for name, allowed in self._drop.items():
            if name not in means:
                continue
            place, now = (source, name), Point(step, trained, means[name])
            best = self._best.setdefault(place, now)
            if now.heldout >= best.heldout:
                self._best[place] = now
            fallen = best.heldout - now.heldout > allowed
            if fallen and now.trained > best.trained and place not in self._fallen:
                self._fallen.add(place)
                yield Fall(name, source, best, now, allowed)
            elif not fallen:
                self._fallen.discard(place)
