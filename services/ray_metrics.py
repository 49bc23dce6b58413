"""A run's metrics in Ray's own: Prometheus scrapes them from every node, `ray_dgpo_...` is their name there.

Promises
- `METRICS` lists every metric and its labels, as docs/watching.md does. Beside `run` a label is the
  name of a reward, a part, a phase, an event or an error: none grows with the length of a run.
- What is null is left out, and keeps its last value.
- Costs a dictionary entry a value: Ray's agent collects them every few seconds, and a run whose agent is gone
  does not notice.

Knows the rows (services/metrics.py) and Ray, not the queue.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from ray.util.metrics import Counter, Gauge, Histogram

from services.messages import Heartbeat, PolicyVersion
from services.metrics import AnyRow, EvalRow, EventRow, UpdateRow
from services.queue_types import RunState


@dataclass(frozen=True)
class Described:
    """What a metric says, and its labels beside `run`."""

    text: str
    labels: tuple[str, ...] = ()
    kind: Literal["gauge", "counter", "histogram"] = "gauge"


METRICS: Final[Mapping[str, Described]] = {
    "dgpo_state": Described("1 for the state of a run that goes on, 0 for the others.", ("state",)),
    "dgpo_step": Described("Updates made."),
    "dgpo_max_steps": Described("Updates in all."),
    "dgpo_updated_timestamp_seconds": Described("Unix time of the last update, or of the start."),
    "dgpo_update_seconds": Described("Wall time of the last update."),
    "dgpo_groups": Described("Groups trained."),
    "dgpo_images": Described("Samples trained."),
    "dgpo_groups_per_second": Described("Groups trained a second, in the last update."),
    "dgpo_total_reward": Described("Mean total reward of the last update's samples."),
    "dgpo_total_reward_std": Described("Mean standard deviation of the total reward within a group."),
    "dgpo_reward": Described("Mean score of the last update's samples.", ("reward",)),
    "dgpo_reward_std": Described("Mean standard deviation of a score within a group.", ("reward",)),
    "dgpo_reward_quantile": Described(
        "Score that a share of the last update's samples have or less: 0.1, 0.5, 0.9.", ("reward", "quantile")
    ),
    "dgpo_eval_reward": Described("Mean score on held-out prompts, EMA weights.", ("reward",)),
    "dgpo_zero_variance_groups": Described("Groups of the last update that taught nothing."),
    "dgpo_dropped_terms": Described("Groups of the last update that lack this reward.", ("reward",)),
    "dgpo_staleness_mean": Described("Updates that the last update's groups lagged behind, mean."),
    "dgpo_staleness_max": Described("The same of the stalest."),
    "dgpo_staleness": Described(
        "Groups by how many updates they lagged behind when they were trained.", kind="histogram"
    ),
    "dgpo_queue_depth": Described("Groups waiting after the last take."),
    "dgpo_queue_bytes": Described("Their payload."),
    "dgpo_loss": Described("Loss of the last update."),
    "dgpo_dsm": Described("Mean DSM error of the policy."),
    "dgpo_grad_norm": Described("Gradient norm before clipping."),
    "dgpo_group_weight": Described("Mean of sigmoid(beta * S_g)."),
    "dgpo_clip_fraction": Described("Share of (sample, timestep) pairs that were clipped."),
    "dgpo_kl": Described("KL term before its weight."),
    "dgpo_learning_rate": Described("Learning rate of the last update."),
    "dgpo_learner_seconds": Described("Seconds of the last update by phase of the learner.", ("phase",)),
    "dgpo_rollout_seconds": Described("Mean seconds a group by phase of the rollout.", ("phase",)),
    "dgpo_part_up": Described("1 while the heartbeat of a part comes, else 0.", ("part",)),
    "dgpo_part_state_seconds": Described("Seconds since a part began what it is doing.", ("part",)),
    "dgpo_part_version_lag": Described("Updates that a part's weights are behind the newest.", ("part",)),
    "dgpo_part_install_seconds": Described(
        "Time of a worker's last install of weights, from fetching to proof.", ("part",)
    ),
    "dgpo_part_groups": Described("Groups that a part has completed since it started.", ("part",)),
    "dgpo_part_memory_bytes": Described("Peak resident memory of a part.", ("part",)),
    "dgpo_events": Described(
        "Events: workers that died, dead letters, guards, silent parts.", ("event",), "counter"
    ),
    "dgpo_reward_request_seconds": Described(
        "Time of a request to a reward, retries included.", ("reward",), "histogram"
    ),
    "dgpo_reward_errors": Described("Requests that failed for good.", ("reward", "error"), "counter"),
}

_OF_AN_UPDATE: Final = {
    "dgpo_step": "step",
    "dgpo_max_steps": "max_steps",
    "dgpo_updated_timestamp_seconds": "time",
    "dgpo_update_seconds": "seconds",
    "dgpo_groups": "groups",
    "dgpo_images": "images",
    "dgpo_groups_per_second": "groups_per_s",
    "dgpo_total_reward": "reward_mean",
    "dgpo_total_reward_std": "reward_std",
    **{
        f"dgpo_{name}": name
        for name in (
            *("zero_variance_groups", "staleness_mean", "staleness_max", "queue_depth", "queue_bytes"),
            *("loss", "dsm", "grad_norm", "group_weight", "clip_fraction", "kl", "learning_rate"),
        )
    },
}
"""Metric -> field of UpdateRow."""

_QUANTILES: Final = {"p10": "0.1", "p50": "0.5", "p90": "0.9"}
_LAGS: Final = [0.5, 1.5, 2.5, 4.5, 8.5, 16.5]
"""Between whole numbers of updates; Ray takes no bound at 0."""
_SECONDS: Final = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0]


class RunMetrics:
    """The driver's side: rows and heartbeats."""

    def __init__(self, run: str, rewards: Iterable[str] = ()) -> None:
        self._run = run
        self._rewards = tuple(rewards)
        self._gauges = {
            name: Gauge(name, told.text, ("run", *told.labels))
            for name, told in METRICS.items()
            if told.kind == "gauge"
        }
        self._events = _counter("dgpo_events")
        self._staleness = _histogram("dgpo_staleness", _LAGS)
        self._parts: set[str] = set()
        # A run that hangs before its first update has made none for that long.
        self._set("dgpo_updated_timestamp_seconds", time.time())
        self.state("starting")

    def add(self, row: AnyRow) -> None:
        """A row of metrics.jsonl."""
        if isinstance(row, UpdateRow):
            self._update(row)
        elif isinstance(row, EvalRow):
            for name, score in row.rewards.items():
                self._set("dgpo_eval_reward", score.mean, reward=name)
        elif isinstance(row, EventRow):
            self._events.inc(1, {"run": self._run, "event": row.what})

    def _update(self, row: UpdateRow) -> None:
        for metric, field in _OF_AN_UPDATE.items():
            self._set(metric, getattr(row, field))
        for name, spread in row.rewards.items():
            self._set("dgpo_reward", spread.mean, reward=name)
            self._set("dgpo_reward_std", spread.std, reward=name)
            for field, share in _QUANTILES.items():
                self._set("dgpo_reward_quantile", getattr(spread, field), reward=name, quantile=share)
        for lag, groups in enumerate(row.staleness):
            for _ in range(groups):
                self._staleness.observe(lag, {"run": self._run})
        for name in self._rewards:
            self._set("dgpo_dropped_terms", row.dropped_terms.get(name, 0), reward=name)
        for phases, metric in ((row.phases, "dgpo_learner_seconds"), (row.rollout, "dgpo_rollout_seconds")):
            for phase, seconds in phases.items():
                self._set(metric, seconds, phase=phase.removesuffix("_s"))

    def state(self, state: RunState) -> None:
        for name in get_args(RunState):
            self._set("dgpo_state", float(name == state), state=name)

    def beats(self, alive: Iterable[Heartbeat], newest: PolicyVersion | None) -> None:
        """Heartbeats that are there now; parts that were there before and are not now are down."""
        now, seen = time.time(), set()
        for beat in alive:
            seen.add(beat.part)
            self._set("dgpo_part_up", 1, part=beat.part)
            self._set("dgpo_part_state_seconds", max(0.0, now - beat.since), part=beat.part)
            self._set("dgpo_part_install_seconds", beat.install_s, part=beat.part)
            self._set("dgpo_part_groups", beat.groups, part=beat.part)
            self._set("dgpo_part_memory_bytes", beat.rss_bytes, part=beat.part)
            if newest is not None and beat.version is not None:
                self._set("dgpo_part_version_lag", newest.step - beat.version.step, part=beat.part)
        for part in self._parts - seen:
            self._set("dgpo_part_up", 0, part=part)
        self._parts |= seen

    def forget(self, part: str) -> None:
        """A part that has been taken away is not down."""
        self._parts.discard(part)
        for metric in ("dgpo_part_up", "dgpo_part_version_lag", "dgpo_part_install_seconds"):
            self._set(metric, math.nan, part=part)

    def _set(self, metric: str, value: float | None, **labels: str) -> None:
        if value is not None:
            self._gauges[metric].set(value, {"run": self._run, **labels})


class RewardMetrics:
    """A rollout worker's side: how its requests to the rewards went."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._seconds = _histogram("dgpo_reward_request_seconds", _SECONDS)
        self._errors = _counter("dgpo_reward_errors")

    def asked(self, reward: str, seconds: float, error: Exception | None) -> None:
        labels = {"run": self._run, "reward": reward}
        self._seconds.observe(seconds, labels)
        if error is not None:
            self._errors.inc(1, labels | {"error": type(error).__name__})


def _counter(name: str) -> Counter:
    return Counter(name, METRICS[name].text, ("run", *METRICS[name].labels))


def _histogram(name: str, bounds: list[float]) -> Histogram:
    told = METRICS[name]
    return Histogram(name, told.text, boundaries=bounds, tag_keys=("run", *told.labels))


def reference() -> str:
    """METRICS as a Markdown table."""
    rows = [
        f"| `{name}` | {told.kind} | {', '.join(f'`{label}`' for label in told.labels)} | {told.text} |"
        for name, told in METRICS.items()
    ]
    return "\n".join(["| metric | kind | labels | what it says |", "| --- | --- | --- | --- |", *rows, ""])
