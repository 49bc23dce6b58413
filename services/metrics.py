"""The rows of `metrics.jsonl`: what a run says of itself, typed, one JSON object a line.

Promises
- Rows are frozen, told apart by `kind`, and closed to unknown fields.
- Every line is valid JSON: a number that is not finite is stored as null, so telemetry never stops a run.
- Imports no torch, Redis or Ray: the report and the terminal view read these on any machine.

Who writes: services/telemetry.py. Who reads: services/progress.py, services/report/.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter


def _finite_or_null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite_or_null)]
"""A measured value; null where it was not measured or not finite."""


class Row(BaseModel):
    """Base of every row: frozen and closed."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    time: float
    """Unix time at which the row was written."""


class Spread(BaseModel):
    """How the scores of one reward lie, over the groups of an update."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    mean: Number
    """Mean score of the update's samples."""
    std: Number = None
    """Mean standard deviation of the score within a group."""
    p10: Number = None
    """A tenth of the update's samples score this or less."""
    p50: Number = None
    """Their median."""
    p90: Number = None
    """A tenth of them score this or more."""


class Estimate(BaseModel):
    """A mean over held-out prompts and its standard error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    mean: Number
    """Over the prompts that were scored."""
    se: Number = None
    """Standard error of the mean."""


class UpdateRow(Row):
    """One update of the learner."""

    kind: Literal["update"] = "update"
    epoch: int = Field(ge=0)
    """Grows by one at each resume."""
    step: int = Field(ge=0)
    """Updates taken when this one was done: the first has step 1."""
    max_steps: int = Field(ge=1)
    """Updates that the run shall take."""
    seconds: float = Field(ge=0)
    """Wall time since the update before."""
    reward_mean: Number
    """Mean total reward of the update's samples."""
    reward_std: Number
    """Mean within-group standard deviation of the total reward: what there is to learn from."""
    rewards: dict[str, Spread] = Field(default_factory=dict)
    """By reward name, the held-out ones too."""
    zero_variance_groups: int = 0
    """Groups whose samples all had the same total reward; they teach nothing."""
    dropped_terms: dict[str, int] = Field(default_factory=dict)
    """Optional reward -> groups that were trained without it, because it had failed."""
    prompts_left_out: int = 0
    """Places of the prompts that the curriculum left out when it assigned those of later updates."""
    staleness_mean: Number = None
    """Updates that the groups lagged behind."""
    staleness_max: int = 0
    """The same of the stalest of them."""
    staleness: tuple[int, ...] = ()
    """Groups by how many updates they lagged behind: those that did not come first."""
    queue_depth: int = 0
    """Groups waiting in the queue after the take."""
    queue_bytes: int = 0
    """Their payload."""
    groups: int = 0
    """Groups trained since the run began."""
    images: int = 0
    """Samples trained since the run began."""
    ordinals: tuple[int, ...] = ()
    """Of the groups that were trained, in their order."""
    groups_per_s: Number = None
    """Groups trained a second in this update."""
    loss: Number = None
    """What the objective minimises."""
    dsm: Number = None
    """Mean DSM error of the policy."""
    grad_norm: Number = None
    """Before clipping."""
    group_weight: Number = None
    """Mean of sigmoid(beta * S_g) over groups and timesteps."""
    group_score: Number = None
    """Mean of S_g over groups and timesteps."""
    clip_fraction: Number = None
    """Share of (sample, timestep) pairs whose DSM error was clipped."""
    kl: Number = None
    """KL term before its weight."""
    learning_rate: Number = None
    """Of the optimizer, in this update."""
    micro_batch: int | None = None
    """Samples in one forward-backward: what `learner.micro_batch` says, or `auto` found."""
    phases: dict[str, float] = Field(default_factory=dict)
    """Seconds of this update by phase of the learner: wait_s, codec_s, forward_backward_s, publish_s,
    commit_s, checkpoint_s; of a colocated run turn_s, for its turn and for moving on and off the card."""
    update: dict[str, float] = Field(default_factory=dict)
    """What forward_backward_s consists of: reference_s, forward_s, backward_s, optimizer_s, ema_s; of several
    ranks what rank 0 spent on each, and in ranks_s on waiting for the others and adding up gradients."""
    rollout: dict[str, float] = Field(default_factory=dict)
    """Mean seconds a group: sample_s, reward_s, overhead_s."""
    probe_error: Number = None
    """Largest relative error of a worker's velocity to the learner's with the same weights, as last compared
    (`learner.probe_every`)."""
    rss_bytes: int = 0
    """Peak resident memory of the learner."""


When = Literal["before", "during", "after"]


class EvalRow(Row):
    """One evaluation of the EMA weights on held-out prompts."""

    kind: Literal["eval"] = "eval"
    when: When = "during"
    """Before the first update, between updates, or after the last one."""
    epoch: int = Field(ge=0)
    """Of the weights that were evaluated."""
    step: int = Field(ge=0)
    """Updates that these weights have seen."""
    prompts: int = Field(ge=0)
    """Held-out prompts scored."""
    rewards: dict[str, Estimate] = Field(default_factory=dict)
    """By reward name: the score."""
    exact: dict[str, Estimate] = Field(default_factory=dict)
    """By reward name: the rate of exact matches, for scorers that tell."""
    diversity: dict[str, Number] = Field(default_factory=dict)
    """By measure: how much the images differ; empty where it was not measured."""
    seconds: float = Field(default=0.0, ge=0)
    """Wall time of the evaluation."""


class EventRow(Row):
    """Something that happened once: a restart, a dead letter, a resume."""

    kind: Literal["event"] = "event"
    level: Literal["info", "warning", "error"] = "info"
    """How bad it is."""
    what: str
    """A few words: "worker died", "dead letter", "resumed"."""
    detail: str = ""
    """Why, in a sentence; shown escaped."""
    step: int | None = None
    """Update at which it happened, where there is one."""
    ordinal: int | None = None
    """Group that it happened to, where there is one."""


class MemoryRow(Row):
    """Peak resident memory of each process, written once when the run ends."""

    kind: Literal["memory"] = "memory"
    parts: dict[str, int]
    """Part -> bytes."""


AnyRow = UpdateRow | EvalRow | EventRow | MemoryRow
_ROWS: TypeAdapter[AnyRow] = TypeAdapter(Annotated[AnyRow, Field(discriminator="kind")])


def parse_row(line: str | bytes) -> AnyRow:
    """One line of metrics.jsonl.

    >>> parse_row('{"kind": "event", "time": 1.0, "what": "resumed"}').what
    'resumed'

    Raises:
        pydantic.ValidationError: the line is not a row.
    """
    return _ROWS.validate_json(line)


def row_of(fields: dict[str, Any]) -> AnyRow:
    """A row as it comes through the queue server.

    Raises:
        pydantic.ValidationError: the fields are no row.
    """
    return _ROWS.validate_python(fields)
