"""The charts of a run and where its time went, from the rows of metrics.jsonl.

Promises
- Knows nothing of files and pages: rows in, charts and shares out.
- What was never measured gives no chart, so that the page shows no empty frames but for reward and held-out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from services.metrics import Estimate, EvalRow, UpdateRow
from services.report.charts import Chart, Series, Share, line_chart, points, share_bar
from services.telemetry import Metrics

LEARNER = (
    ("loss", "Loss", None),
    ("dsm", "DSM error of the policy", None),
    ("grad_norm", "Gradient norm before clipping", 0.0),
    ("group_weight", "Group weight, sigmoid(beta S)", None),
    ("clip_fraction", "Share of samples clipped", 0.0),
    ("kl", "KL term", 0.0),
    ("learning_rate", "Learning rate", 0.0),
)
_PHASES = {
    "forward_backward_s": ("forward and backward", 0),
    "wait_s": ("wait for groups", 1),
    "checkpoint_s": ("checkpoint", 2),
    "publish_s": ("publish weights", 3),
    "codec_s": ("codec", 4),
    "commit_s": ("commit", 4),
    "turn_s": ("turns on the card", 1),
}
_OVERHEAD = ("publish_s", "codec_s", "commit_s")
_OTHER_TONE = 5


@dataclass(frozen=True)
class TimeBreakdown:
    """Where the time of a part went, mean seconds."""

    title: str
    unit: str
    seconds: float
    shares: tuple[Share, ...]
    bar: Markup
    note: str = ""


def reward_charts(metrics: Metrics, heldout: Iterable[str]) -> list[Chart]:
    """Reward of the training groups, and scores and exact matches on held-out prompts."""
    updates, marks = metrics.updates, resumes(metrics.updates)
    held = set(heldout)
    total = Series("total", points((row.step, row.reward_mean, row.reward_std) for row in updates))
    rows: tuple[UpdateRow | EvalRow, ...] = (*metrics.updates, *metrics.evals)
    named = [
        Series(name, points(_reward(updates, name)), tone, dashed=name in held)
        for name, tone in reward_tones((name for row in rows for name in row.rewards), held).items()
        if tone > 0
    ]
    charts = [
        line_chart(
            "Reward of the training groups",
            [total, *named],
            marks=marks,
            small=True,
            note="band: mean standard deviation within a group" + ("; dashed: held out" if held else ""),
        )
    ]
    fields: tuple[tuple[str, Callable[[EvalRow], Mapping[str, Estimate]]], ...] = (
        ("Held-out score", lambda row: row.rewards),
        ("Held-out exact matches", lambda row: row.exact),
    )
    for title, read in fields:
        found = list(dict.fromkeys(name for row in metrics.evals for name in read(row)))
        series = [
            Series(
                name, points(_estimates(metrics.evals, read, name)), tone, dashed=name in held, marked=True
            )
            for tone, name in enumerate(found)
        ]
        if series or read is fields[0][1]:
            charts.append(line_chart(title, series, marks=marks, note="bars: one standard error", small=True))
    return charts


def flow_charts(updates: Sequence[UpdateRow], *, curriculum: bool) -> list[Chart]:
    """Staleness, queue and pace; with a curriculum the prompts that it leaves out."""
    if not updates:
        return []
    marks = resumes(updates)
    charts = [
        line_chart(
            "Staleness of the groups, in updates",
            [
                Series("mean", points((row.step, row.staleness_mean, None) for row in updates)),
                Series(
                    "max",
                    points((row.step, float(row.staleness_max), None) for row in updates),
                    1,
                    dashed=True,
                ),
            ],
            floor=0.0,
            ceiling=1.0 if all(row.staleness_max <= 1 for row in updates) else None,
            marks=marks,
            digits=2,
        ),
        line_chart(
            "Groups waiting in the queue",
            [Series("groups", points((row.step, float(row.queue_depth), None) for row in updates))],
            floor=0.0,
            marks=marks,
            digits=0,
        ),
        line_chart(
            "Seconds an update",
            [Series("seconds", points((row.step, row.seconds, None) for row in updates))],
            floor=0.0,
            marks=marks,
            digits=1,
        ),
        line_chart(
            "Groups without variance, of an update",
            [Series("groups", points((row.step, float(row.zero_variance_groups), None) for row in updates))],
            floor=0.0,
            marks=marks,
            digits=0,
        ),
    ]
    if curriculum:
        left_out = points((row.step, float(row.prompts_left_out), None) for row in updates)
        charts.append(
            line_chart(
                "Prompts left out by the curriculum, by an update",
                [Series("prompts", left_out)],
                floor=0.0,
                marks=marks,
                digits=0,
            )
        )
    return charts


def learner_charts(updates: Sequence[UpdateRow]) -> list[Chart]:
    """The numbers of the update itself; those never measured are left out."""
    charts = []
    for field, title, floor in LEARNER:
        series = Series(title, points((row.step, getattr(row, field), None) for row in updates))
        if series.points and (field != "kl" or any(point.y for point in series.points)):
            charts.append(
                line_chart(title, [series], floor=floor, marks=resumes(updates), digits=None, small=True)
            )
    return charts


def time_breakdowns(updates: Sequence[UpdateRow]) -> list[TimeBreakdown]:
    """Of an update of the learner, and of a group in a rollout worker."""
    rows = [row for row in updates if row.phases]
    if len(rows) > 3:
        rows = rows[1:]
    if not rows:
        return []
    whole = sum(row.seconds for row in rows) / len(rows)
    phases = {
        name: sum(row.phases.get(name, 0.0) for row in rows) / len(rows)
        for name in dict.fromkeys(name for row in rows for name in row.phases)
    }
    overhead = sum(phases.get(name, 0.0) for name in _OVERHEAD)
    whole = max(whole, sum(phases.values()))
    order = sorted(phases, key=lambda name: list(_PHASES).index(name) if name in _PHASES else len(_PHASES))
    labelled = [(*_PHASES.get(name, (name.removesuffix("_s"), _OTHER_TONE)), phases[name]) for name in order]
    labelled.append(("other", _OTHER_TONE, whole - sum(phases.values())))
    note = f"Codec, publish and commit of the learner: {overhead / whole:.1%} of an update." if whole else ""
    found = [_breakdown("An update of the learner", "update", labelled, note)]
    rollout = {
        name: [row.rollout[name] for row in rows if name in row.rollout] for name in ("sample_s", "reward_s")
    }
    if all(rollout.values()):
        means = {name: sum(values) / len(values) for name, values in rollout.items()}
        found.append(
            _breakdown(
                "A group in a rollout worker",
                "group",
                [("encode, sample, decode", 0, means["sample_s"]), ("rewards", 1, means["reward_s"])],
                "A worker samples its next group while it waits for the rewards of the last one.",
            )
        )
    return found


def resumes(updates: Sequence[UpdateRow]) -> tuple[float, ...]:
    """The steps after which a later epoch goes on."""
    return tuple(float(before.step) for before, after in pairwise(updates) if after.epoch > before.epoch)


def reward_tones(names: Iterable[str], held: set[str]) -> dict[str, int]:
    """A colour for each reward, the same in every chart; a reward trained alone has that of the total."""
    names = tuple(dict.fromkeys(names))
    trained = [name for name in names if name not in held]
    first = 1 if len(trained) > 1 else 0
    ordered = [*trained, *(name for name in names if name in held)]
    tones = {name: place + first for place, name in enumerate(ordered)}
    return tones if trained else {name: place + 1 for place, name in enumerate(ordered)}


def _breakdown(
    title: str, unit: str, parts: Sequence[tuple[str, int, float]], note: str = ""
) -> TimeBreakdown:
    whole = sum(seconds for _, _, seconds in parts)
    shares = tuple(
        Share(name, seconds, seconds / whole if whole else 0.0, tone) for name, tone, seconds in parts
    )
    return TimeBreakdown(title, unit, whole, shares, share_bar(title, shares), note)


def _reward(updates: Sequence[UpdateRow], name: str) -> Iterable[tuple[float, float | None, float | None]]:
    return ((row.step, row.rewards[name].mean, None) for row in updates if name in row.rewards)


def _estimates(
    evals: Sequence[EvalRow], read: Callable[[EvalRow], Mapping[str, Estimate]], name: str
) -> Iterable[tuple[float, float | None, float | None]]:
    return ((row.step, read(row)[name].mean, read(row)[name].se) for row in evals if name in read(row))
