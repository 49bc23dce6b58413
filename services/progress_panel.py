"""The panel of the terminal view: rows and heartbeats in, something that rich can draw out.

Promises
- Pure: the same view gives the same panel, and drawing changes nothing.
- At 80 columns nothing wraps; what does not fit is cut with an ellipsis.
- Text from elsewhere is shown as text, never read as markup; a missing number is a dash.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from services.formatting import duration, number, size, sparkline
from services.messages import Heartbeat
from services.metrics import Estimate, EvalRow, EventRow, UpdateRow

NAMED_WORKERS = 2
"""More than these are counted by state instead of named."""
WINDOW = 20
"""Updates that rates, shares and the ETA are averaged over."""
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_PHASES = {
    "wait_s": "wait",
    "codec_s": "codec",
    "forward_backward_s": "fwd/bwd",
    "publish_s": "publish",
    "commit_s": "commit",
    "checkpoint_s": "checkpoint",
    "turn_s": "turns",
}


@dataclass
class View:
    """What is known of a run at the moment."""

    name: str
    max_steps: int
    heldout: Sequence[str] = ()
    max_staleness: int | None = None
    activity: str = "starting"
    """What the run is doing outside updates; "" during them."""
    elapsed_s: float = 0.0
    row: UpdateRow | None = None
    recent: deque[UpdateRow] = field(default_factory=lambda: deque(maxlen=WINDOW))
    rewards: list[float] = field(default_factory=list)
    first_eval: EvalRow | None = None
    last_eval: EvalRow | None = None
    event: EventRow | None = None
    """The newest warning or error."""
    beats: Sequence[Heartbeat] = ()
    learner_step: int = 0

    @property
    def eta_s(self) -> float | None:
        if self.row is None:
            return None
        mean = sum(row.seconds for row in self.recent) / len(self.recent)
        return mean * (self.max_steps - self.row.step)


def panel(view: View) -> RenderableType:
    """The view as rich draws it."""
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(style="dim", no_wrap=True, width=8)
    table.add_column(ratio=1, overflow="ellipsis", no_wrap=True)
    for label, value in _rows(view):
        table.add_row(label, value)
    parts: list[RenderableType] = [_head(view), table]
    if view.activity:
        turning = _SPINNER[int(view.elapsed_s * 2) % len(_SPINNER)]
        parts.append(Text(f"{turning} {view.activity}", overflow="ellipsis", no_wrap=True))
    return Group(*parts)


def _head(view: View) -> RenderableType:
    step = view.row.step if view.row else 0
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(no_wrap=True, max_width=24, overflow="ellipsis")
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, justify="right")
    clock = Text(f"{step}/{view.max_steps}", style="bold")
    clock.append(f"  {duration(view.elapsed_s)}", style="not bold")
    remaining = view.eta_s
    if remaining is not None and step < view.max_steps:
        clock.append(f"  ETA {duration(remaining)}", style="cyan not bold")
    grid.add_row(Text(view.name, style="bold"), ProgressBar(total=view.max_steps, completed=step), clock)
    return grid


def _rows(view: View) -> list[tuple[str, Text]]:
    rows: list[tuple[str, Text]] = []
    row = view.row
    if row is not None:
        reward = Text(f"{number(row.reward_mean)} ± {number(row.reward_std)}  ", style="bold green")
        reward.append(sparkline(view.rewards, 24), style="green not bold")
        for name in view.heldout:
            if name in row.rewards:
                reward.append(f"  {name} {number(row.rewards[name].mean)}", style="default not bold")
        rows.append(("reward", reward))
    rows.extend(_heldout_rows(view))
    if row is not None:
        rows.append(("flow", Text(_flow(view, row))))
    lag = _workers(view)
    if lag:
        rows.append(("workers", lag))
    if row is not None:
        rows.append(("time", Text(_shares(view))))
    if view.event is not None:
        style = "red" if view.event.level == "error" else "yellow"
        rows.append((view.event.level, Text(event_text(view.event), style=style)))
    return rows


def _heldout_rows(view: View) -> list[tuple[str, Text]]:
    now = view.last_eval
    if now is None:
        return []
    was = view.first_eval or now
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


def _flow(view: View, row: UpdateRow) -> str:
    bound = "" if view.max_staleness is None else f" of {view.max_staleness}"
    parts = [
        f"{number(_rate(view), 2)} groups/s",
        f"queue {row.queue_depth} ({size(row.queue_bytes)})",
        f"staleness {number(row.staleness_mean, 1)}, max {row.staleness_max}{bound}",
    ]
    if row.zero_variance_groups:
        parts.append(f"{row.zero_variance_groups} groups all equal")
    parts += [f"{count} groups without {name}" for name, count in row.dropped_terms.items()]
    return " · ".join(parts)


def _workers(view: View) -> Text:
    workers = [beat for beat in view.beats if beat.part.startswith(("rollout", "feeder"))]
    if len(workers) > NAMED_WORKERS:
        states = Counter(beat.state for beat in workers)
        lags = Counter(_lag(view, beat) for beat in workers if beat.version)
        doing = ", ".join(f"{count} {state}" for state, count in states.most_common())
        return Text(f"{doing} · version lag " + ", ".join(f"{lag}: {lags[lag]}" for lag in sorted(lags)))
    text = Text(" · ").join(Text(f"{beat.part} {beat.state}") for beat in workers)
    lags = Counter(_lag(view, beat) for beat in workers if beat.version)
    if lags:
        text.append(f" · version lag {max(lags)}", style="cyan" if max(lags) else "")
    return text


def _lag(view: View, beat: Heartbeat) -> int:
    return max(0, view.learner_step - beat.version.step) if beat.version else 0


def _shares(view: View) -> str:
    total = sum(row.seconds for row in view.recent)
    names = {name: None for row in view.recent for name in row.phases}
    if not total or not names:
        return "-"
    spent = {name: sum(row.phases.get(name, 0.0) for row in view.recent) for name in names}
    largest = sorted(spent, key=lambda name: -spent[name])[:3]
    parts = [f"{_PHASES.get(name, name.removesuffix('_s'))} {spent[name] / total:.0%}" for name in largest]
    other = 1 - sum(spent[name] for name in largest) / total
    if other >= 0.005:
        parts.append(f"other {other:.0%}")
    return f"{total / len(view.recent):.1f} s/step · " + " · ".join(parts)


def _rate(view: View) -> float | None:
    rates = [row.groups_per_s for row in view.recent if row.groups_per_s is not None]
    return sum(rates) / len(rates) if rates else None


def _change(was: Estimate | None, now: Estimate) -> Text:
    text = Text()
    if was is not None and was is not now:
        text.append(f"{number(was.mean)} → ", style="dim")
    text.append(number(now.mean), style="bold green")
    if now.se is not None:
        text.append(f" ± {now.se:.3f}")
    return text


def scores_text(row: EvalRow) -> str:
    parts = []
    for name, score in row.rewards.items():
        text = f"{name} {number(score.mean)}"
        if score.se is not None:
            text += f" ± {score.se:.3f}"
        if name in row.exact:
            text += f", exact {number(row.exact[name].mean)}"
        parts.append(text)
    return " · ".join(parts) or "no scores"


def event_text(row: EventRow) -> str:
    where = f" (ordinal {row.ordinal})" if row.ordinal is not None else ""
    return f"{row.what}{where}: {row.detail}" if row.detail else f"{row.what}{where}"
