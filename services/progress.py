"""What the person who started a run sees while it runs: a live panel, or one line an update.

Promises
- A pure view: it is given rows and heartbeats, and asks nobody for anything.
- On a terminal it draws one panel in place and leaves it there, finished, at the end; elsewhere it writes
  one plain line an update, so that logs stay readable; `quiet` writes nothing.
- Writes to standard error unless told otherwise: standard output belongs to results.
- May be fed from one thread while it draws in another.

What the panel looks like: services/progress_panel.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from services.formatting import duration, number
from services.messages import Heartbeat
from services.metrics import AnyRow, EvalRow, EventRow, UpdateRow
from services.progress_panel import View, event_text, panel, scores_text

logger = logging.getLogger(__name__)


class Progress:
    """The view of one run; use as a context manager.

    >>> from services.metrics import UpdateRow
    >>> with Progress("demo", max_steps=2, quiet=True) as progress:
    ...     progress.update_row(UpdateRow(time=0, epoch=0, step=1, max_steps=2, seconds=4, reward_mean=0.5,
    ...                                   reward_std=0.1))
    """

    def __init__(
        self,
        name: str,
        max_steps: int,
        *,
        heldout: Sequence[str] = (),
        max_staleness: int | None = None,
        console: Console | None = None,
        quiet: bool = False,
    ) -> None:
        """Args:
        heldout: names of rewards that are scored and not trained.
        max_staleness: shown beside the staleness seen.
        """
        self._view = View(name, max_steps, heldout=tuple(heldout), max_staleness=max_staleness)
        self._console = console or Console(stderr=True)
        self._quiet = quiet
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if not self._quiet and self._console.is_terminal:
            self._live = Live(get_renderable=self.render, console=self._console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._view.activity = ""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def activity(self, text: str) -> None:
        """What the run is doing outside updates: starting a part, evaluating, exporting. "" for updates."""
        changed = text != self._view.activity
        self._view.activity = text
        if text and changed:
            logger.info("%s", text)
            self._line(text)

    def row(self, row: AnyRow) -> None:
        """Any row that telemetry writes."""
        if isinstance(row, UpdateRow):
            self.update_row(row)
        elif isinstance(row, EvalRow):
            self.eval_row(row)
        elif isinstance(row, EventRow):
            self.event_row(row)

    def update_row(self, row: UpdateRow) -> None:
        with self._lock:
            view = self._view
            view.activity, view.row, view.max_steps = "", row, row.max_steps
            view.recent.append(row)
            view.learner_step = max(view.learner_step, row.step)
            if row.reward_mean is not None:
                view.rewards.append(row.reward_mean)
        self._line(self._update_line(row))

    def eval_row(self, row: EvalRow) -> None:
        with self._lock:
            self._view.last_eval = row
            self._view.first_eval = self._view.first_eval or row
        self._line(f"eval at step {row.step}: {scores_text(row)}")

    def event_row(self, row: EventRow) -> None:
        if row.level != "info":
            self._view.event = row
        self._line(f"{row.level}: {event_text(row)}")

    def heartbeats(self, beats: Sequence[Heartbeat]) -> None:
        """The newest heartbeat of each part."""
        steps = [beat.version.step for beat in beats if beat.part.startswith("learner") and beat.version]
        with self._lock:
            self._view.beats = sorted(beats, key=lambda beat: beat.part)
            self._view.learner_step = max([self._view.learner_step, *steps])

    def render(self) -> RenderableType:
        """The panel as it is now."""
        with self._lock:
            self._view.elapsed_s = time.monotonic() - self._started
            return panel(self._view)

    def _update_line(self, row: UpdateRow) -> str:
        remaining = self._view.eta_s
        heldout = [name for name in self._view.heldout if name in row.rewards]
        parts = [
            f"step {row.step}/{row.max_steps}",
            f"reward {number(row.reward_mean)} ± {number(row.reward_std)}",
            *(f"{name} {number(row.rewards[name].mean)}" for name in heldout),
            f"staleness {number(row.staleness_mean, 1)} (max {row.staleness_max})",
            f"queue {row.queue_depth}",
            f"{number(row.groups_per_s, 2)} groups/s",
            f"ETA {duration(remaining)}" if remaining is not None else "",
        ]
        return "  ".join(part for part in parts if part)

    def _line(self, text: str) -> None:
        if self._live is None and not self._quiet:
            self._console.print(Text(text), soft_wrap=True)
