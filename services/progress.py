"""What the person who started a run sees while it runs: a live panel, or one line an update.

Promises
- A pure view: it is given rows and heartbeats, and asks nobody for anything.
- On a terminal it draws one panel in place and leaves it there, finished, at the end; elsewhere it writes
  one plain line an update, so that logs stay readable; `quiet` writes nothing.
- Writes to standard error unless told otherwise: standard output belongs to results.
- Nothing it is given can end the run: text is shown as text, missing numbers as a dash.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from services.formatting import duration, number, size, sparkline
from services.messages import Heartbeat
from services.metrics import AnyRow, Estimate, EvalRow, EventRow, UpdateRow

NAMED_WORKERS = 2
"""More than these are counted by state instead of named."""
WINDOW = 20
"""Updates that rates, shares and the ETA are averaged over."""
_PHASES = {
    "wait_s": "wait",
    "codec_s": "codec",
    "forward_backward_s": "fwd/bwd",
    "publish_s": "publish",
    "commit_s": "commit",
    "checkpoint_s": "checkpoint",
}


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
        self._name = name
        self._max_steps = max_steps
        self._heldout = tuple(heldout)
        self._max_staleness = max_staleness
        self._console = console or Console(stderr=True)
        self._quiet = quiet
        self._started = time.monotonic()
        self._activity = "starting"
        self._row: UpdateRow | None = None
        self._recent: deque[UpdateRow] = deque(maxlen=WINDOW)
        self._history: list[float] = []
        self._first_eval: EvalRow | None = None
        self._eval: EvalRow | None = None
        self._event: EventRow | None = None
        self._beats: list[Heartbeat] = []
        self._learner_step = 0
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if not self._quiet and self._console.is_terminal:
            self._live = Live(get_renderable=self.render, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._activity = ""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def activity(self, text: str) -> None:
        """What the run is doing outside updates: starting a part, evaluating, exporting. "" for updates."""
        if text and text != self._activity:
            self._line(text)
        self._activity = text

    def row(self, row: AnyRow) -> None:
        """Any row that telemetry writes."""
        if isinstance(row, UpdateRow):
            self.update_row(row)
        elif isinstance(row, EvalRow):
            self.eval_row(row)
        elif isinstance(row, EventRow):
            self.event_row(row)

    def update_row(self, row: UpdateRow) -> None:
        self._activity = ""
        self._row = row
        self._recent.append(row)
        self._max_steps = row.max_steps
        self._learner_step = max(self._learner_step, row.step)
        if row.reward_mean is not None:
            self._history.append(row.reward_mean)
        self._line(self._update_line(row))

    def eval_row(self, row: EvalRow) -> None:
        self._eval = row
        self._first_eval = self._first_eval or row
        self._line(f"eval at step {row.step}: {_scores(row)}")

    def event_row(self, row: EventRow) -> None:
        if row.level != "info":
            self._event = row
        self._line(f"{row.level}: {_event(row)}")

    def heartbeats(self, beats: Sequence[Heartbeat]) -> None:
        """The newest heartbeat of each part."""
        self._beats = sorted(beats, key=lambda beat: beat.part)
        steps = [beat.version.step for beat in beats if beat.part.startswith("learner") and beat.version]
        self._learner_step = max([self._learner_step, *steps])

    def render(self) -> RenderableType:
        """The panel as it is now."""
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        table.add_column(style="dim", no_wrap=True, width=8)
        table.add_column(ratio=1, overflow="ellipsis", no_wrap=True)
        for label, value in self._rows():
            table.add_row(label, value)
        parts: list[RenderableType] = [self._head(), table]
        if self._activity:
            parts.append(Spinner("dots", text=Text(" " + self._activity, overflow="ellipsis", no_wrap=True)))
        return Group(*parts)

    def _head(self) -> RenderableType:
        step = self._row.step if self._row else 0
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(no_wrap=True, max_width=24, overflow="ellipsis")
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        clock = Text(f"{step}/{self._max_steps}", style="bold")
        clock.append(f"  {duration(time.monotonic() - self._started)}", style="not bold")
        remaining = self._eta()
        if remaining is not None and step < self._max_steps:
            clock.append(f"  ETA {duration(remaining)}", style="cyan not bold")
        grid.add_row(
            Text(self._name, style="bold"), ProgressBar(total=self._max_steps, completed=step), clock
        )
        return grid

    def _rows(self) -> list[tuple[str, Text]]:
        rows: list[tuple[str, Text]] = []
        row = self._row
        if row is not None:
            reward = Text(f"{number(row.reward_mean)} ± {number(row.reward_std)}  ", style="bold green")
            reward.append(sparkline(self._history, 24), style="green not bold")
            for name in self._heldout:
                if name in row.rewards:
                    reward.append(f"  {name} {number(row.rewards[name].mean)}", style="default not bold")
            rows.append(("reward", reward))
        rows.extend(self._heldout_rows())
        if row is not None:
            rows.append(("flow", Text(self._flow(row))))
        lag = self._workers()
        if lag:
            rows.append(("workers", lag))
        if row is not None:
            rows.append(("time", Text(self._shares())))
        if self._event is not None:
            style = "red" if self._event.level == "error" else "yellow"
            rows.append((self._event.level, Text(_event(self._event), style=style)))
        return rows

    def _heldout_rows(self) -> list[tuple[str, Text]]:
        now = self._eval
        if now is None:
            return []
        was = self._first_eval or now
        width = max((len(name) for name in now.rewards), default=0)
        lines = []
        for name, score in now.rewards.items():
            line = Text(f"{name:<{width}}  ") + _change(was.rewards.get(name), score)
            if name in now.exact:
                line = line + Text("   exact ") + _change(was.exact.get(name), now.exact[name])
            lines.append(line)
        if len(lines) == 1:
            lines[0].append(f"   step {now.step}", style="dim")
        return list(zip(["held-out", f"step {now.step}", *[""] * len(lines)], lines, strict=False))

    def _flow(self, row: UpdateRow) -> str:
        bound = "" if self._max_staleness is None else f" of {self._max_staleness}"
        parts = [
            f"{number(self._rate(), 2)} groups/s",
            f"queue {row.queue_depth} ({size(row.queue_bytes)})",
            f"staleness {number(row.staleness_mean, 1)}, max {row.staleness_max}{bound}",
        ]
        if row.zero_variance_groups:
            parts.append(f"{row.zero_variance_groups} groups all equal")
        return " · ".join(parts)

    def _workers(self) -> Text:
        workers = [beat for beat in self._beats if beat.part.startswith("rollout")]
        if len(workers) > NAMED_WORKERS:
            states = Counter(beat.state for beat in workers)
            lags = Counter(self._lag(beat) for beat in workers if beat.version)
            doing = ", ".join(f"{count} {state}" for state, count in states.most_common())
            return Text(f"{doing} · version lag " + ", ".join(f"{lag}: {lags[lag]}" for lag in sorted(lags)))
        text = Text(" · ").join(Text(f"{beat.part} {beat.state}") for beat in workers)
        lags = Counter(self._lag(beat) for beat in workers if beat.version)
        if lags:
            text.append(f" · version lag {max(lags)}", style="cyan" if max(lags) else "")
        return text

    def _lag(self, beat: Heartbeat) -> int:
        return max(0, self._learner_step - beat.version.step) if beat.version else 0

    def _shares(self) -> str:
        total = sum(row.seconds for row in self._recent)
        names = {name: None for row in self._recent for name in row.phases}
        if not total or not names:
            return "-"
        spent = {name: sum(row.phases.get(name, 0.0) for row in self._recent) for name in names}
        largest = sorted(spent, key=lambda name: -spent[name])[:3]
        parts = [
            f"{_PHASES.get(name, name.removesuffix('_s'))} {spent[name] / total:.0%}" for name in largest
        ]
        other = 1 - sum(spent[name] for name in largest) / total
        if other >= 0.005:
            parts.append(f"other {other:.0%}")
        return f"{total / len(self._recent):.1f} s/step · " + " · ".join(parts)

    def _eta(self) -> float | None:
        if self._row is None:
            return None
        mean = sum(row.seconds for row in self._recent) / len(self._recent)
        return mean * (self._max_steps - self._row.step)

    def _rate(self) -> float | None:
        rates = [row.groups_per_s for row in self._recent if row.groups_per_s is not None]
        return sum(rates) / len(rates) if rates else None

    def _update_line(self, row: UpdateRow) -> str:
        remaining = self._eta()
        parts = [
            f"step {row.step}/{row.max_steps}",
            f"reward {number(row.reward_mean)} ± {number(row.reward_std)}",
            *(f"{name} {number(row.rewards[name].mean)}" for name in self._heldout if name in row.rewards),
            f"staleness {number(row.staleness_mean, 1)} (max {row.staleness_max})",
            f"queue {row.queue_depth}",
            f"{number(row.groups_per_s, 2)} groups/s",
            f"ETA {duration(remaining)}" if remaining is not None else "",
        ]
        return "  ".join(part for part in parts if part)

    def _line(self, text: str) -> None:
        if self._live is None and not self._quiet:
            self._console.print(Text(text), soft_wrap=True)


def _change(was: Estimate | None, now: Estimate) -> Text:
    text = Text()
    if was is not None and was is not now:
        text.append(f"{number(was.mean)} → ", style="dim")
    text.append(number(now.mean), style="bold green")
    if now.se is not None:
        text.append(f" ± {now.se:.3f}")
    return text


def _scores(row: EvalRow) -> str:
    parts = []
    for name, score in row.rewards.items():
        text = f"{name} {number(score.mean)}"
        if score.se is not None:
            text += f" ± {score.se:.3f}"
        if name in row.exact:
            text += f", exact {number(row.exact[name].mean)}"
        parts.append(text)
    return " · ".join(parts) or "no scores"


def _event(row: EventRow) -> str:
    where = f" (ordinal {row.ordinal})" if row.ordinal is not None else ""
    return f"{row.what}{where}: {row.detail}" if row.detail else f"{row.what}{where}"
