"""What the processes of a run say to each other: frozen, typed, no tensors and no transport.

Promises
- Every message is frozen and refuses unknown fields, so a peer of another version is noticed at once.
- A message is plain JSON (`model_dump_json`); tensors travel beside it as safetensors (services/codec.py).
- Imports neither torch nor Redis nor Ray: any process may read these.
"""

from __future__ import annotations

from functools import total_ordering
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Message(BaseModel):
    """Base of everything sent between processes: frozen, closed to unknown fields, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


@total_ordering
class PolicyVersion(Message):
    """Which weights sampled a group. Ordered; never goes back.

    >>> PolicyVersion(epoch=0, step=41) < PolicyVersion(epoch=1, step=40)
    True
    >>> str(PolicyVersion(epoch=1, step=40))
    '1.40'
    """

    epoch: int = Field(ge=0)
    """Grows by one at each resume."""
    step: int = Field(ge=0)
    """Updates taken when these weights were published."""

    def __lt__(self, other: PolicyVersion) -> bool:
        return (self.epoch, self.step) < (other.epoch, other.step)

    def __str__(self) -> str:
        return f"{self.epoch}.{self.step}"


class Prompt(Message):
    """What an ordinal asks for: follows from (run seed, ordinal) alone."""

    text: str
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Handed to the reward servers as it is (GenEval's `include`, say)."""


class GroupTask(Message):
    """One ordinal, issued to one worker."""

    run: str
    ordinal: int = Field(ge=0)
    attempt: int = Field(ge=1)
    """1 for the first issue; grows when a lease expires or a group is refused."""
    place: int = Field(ge=0)
    """In the sequence of prompts: its ordinal, but for a curriculum."""
    prompt: Prompt
    seeds: tuple[int, ...]
    """One a sample, G in all; each determines the initial noise of its sample."""
    version: PolicyVersion
    """The weights it is sampled with: those at the time of issue, or newer ones."""


class GroupHeader(Message):
    """Everything about a group but its tensors.

    The payload that travels beside it holds `latents` (G, C, H, W), the final latents x0 in the
    order of `seeds`, and `condition.*`, the prompt condition of one sample (encoded once a group).
    """

    run: str
    ordinal: int = Field(ge=0)
    attempt: int = Field(ge=1)
    version: PolicyVersion
    """The weights that really sampled the group."""
    prompt: Prompt
    seeds: tuple[int, ...]
    rewards: dict[str, tuple[float, ...]]
    """Reward name -> G finite scores, in the order of `seeds`. Held-out rewards are in it too."""
    details: dict[str, tuple[dict[str, Any], ...]] = Field(default_factory=dict)
    """Reward name -> G dicts of what the scorer said (recognised text, exact match)."""
    worker: str
    sample_s: float = Field(ge=0)
    """Seconds spent encoding, sampling and decoding."""
    reward_s: float = Field(ge=0)
    """Seconds from the first reward request to the last answer."""
    overhead_s: float = Field(default=0.0, ge=0)
    """Seconds the worker spent on leases, installs, codec and admits since its group before."""

    @property
    def group_size(self) -> int:
        return len(self.seeds)

    @model_validator(mode="after")
    def _whole(self) -> GroupHeader:
        for name, scores in self.rewards.items():
            if len(scores) != len(self.seeds):
                raise ValueError(
                    f"group {self.run}-{self.ordinal}: reward {name!r} has {len(scores)} scores for "
                    f"{len(self.seeds)} samples; a group is whole or it is not there"
                )
        return self


class WeightsAnnouncement(Message):
    """A policy version that workers may install, as announced in the weights stream."""

    version: PolicyVersion
    kind: Literal["policy", "ema"] = "policy"
    """`policy`: what rollout workers sample with; `ema`: what is evaluated and exported."""
    digest: str
    """Of the named tensors (services/codec.py `weights_digest`), hex."""
    tensors: int = Field(ge=1)
    """How many tensors an install must bind."""
    bytes: int = Field(ge=1)
    """Size of the safetensors payload."""
    probe: tuple[float, ...] | None = None
    """The publisher's velocity with these weights (policy/probe.py), to be compared after the install; null:
    nothing to compare."""


class Heartbeat(Message):
    """What a part says of itself, every few seconds, with a time to live."""

    part: str
    """rollout-0, learner-0, evaluator, driver."""
    state: str
    """What it is doing: installing, sampling, scoring, waiting for a lease, updating, ..."""
    since: float
    """Unix time at which it entered that state."""
    version: PolicyVersion | None = None
    """The policy version it runs."""
    ordinal: int | None = None
    groups: int = Field(default=0, ge=0)
    """Groups it has completed."""
    rss_bytes: int = Field(default=0, ge=0)
    """Peak resident memory of the process."""
    probe_error: float | None = Field(default=None, ge=0)
    """Relative error of its velocity to the learner's, when last compared."""
    install_s: float | None = Field(default=None, ge=0)
    """Seconds that its last install of weights took, from the fetching to the proof."""
    pid: int = 0
    node: str = ""


class DeadLetter(Message):
    """An ordinal that was given up, and why."""

    ordinal: int
    attempts: int
    reason: str
