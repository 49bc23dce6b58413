"""The configuration of a run: one YAML file, one pydantic model, nothing untyped.

Promises
- Every field has a type, a range, a unit where it has one, and a one-line meaning.
- Unknown keys, wrong types and impossible combinations are refused with the path in the YAML.
- The model is frozen: a run cannot change its configuration under itself.
- Secrets are not in here: only the names of environment variables or files that hold them.

Here is the whole; its sections are in training.py (what is trained, and how) and parts.py (with whom, where).
Loading, overrides and error text are in services/config_file.py.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from services.config.parts import (
    CheckpointConfig,
    ClusterConfig,
    EvalConfig,
    QueueConfig,
    RewardConfig,
    RunConfig,
    TelemetryConfig,
)
from services.config.section import Section
from services.config.training import (
    AdvantageConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    PromptsConfig,
    RolloutConfig,
    TimestepConfig,
)

__all__ = [
    "AdvantageConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "EvalConfig",
    "LearnerConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "PromptsConfig",
    "QueueConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "TelemetryConfig",
    "TimestepConfig",
]


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    prompts: PromptsConfig
    rollout: RolloutConfig = RolloutConfig()
    rewards: tuple[RewardConfig, ...] = Field(min_length=1)
    advantage: AdvantageConfig = AdvantageConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    learner: LearnerConfig = LearnerConfig()
    queue: QueueConfig = QueueConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def trained_rewards(self) -> tuple[RewardConfig, ...]:
        return tuple(reward for reward in self.rewards if not reward.heldout)

    @model_validator(mode="after")
    def _possible(self) -> Config:
        names = [reward.name for reward in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"rewards: names must differ, got {names}")
        if not self.trained_rewards:
            raise ValueError("rewards: every reward is held out; at least one must be trained")
        steps, picked = self.rollout.steps, self.objective.timesteps
        if picked.first > steps:
            raise ValueError(f"objective.timesteps.first {picked.first} exceeds rollout.steps {steps}")
        if picked.per_update % self.learner.optimizer_steps:
            raise ValueError(
                f"learner.optimizer_steps {self.learner.optimizer_steps} must divide "
                f"objective.timesteps.per_update {picked.per_update}"
            )
        group, micro = self.rollout.group_size, self.learner.micro_batch
        if micro % group and group % micro:
            raise ValueError(
                f"learner.micro_batch {micro} must divide rollout.group_size {group} or be a multiple of it"
            )
        guided_reference = self.objective.reference == "frozen" and self.objective.kl_cfg > 1
        if self.rollout.guidance > 1 and guided_reference:
            raise ValueError(
                f"rollout.guidance {self.rollout.guidance} with objective.kl_cfg "
                f"{self.objective.kl_cfg}: mode 2a is CFG-free, set rollout.guidance to 1"
            )
        if self.queue.max_groups < self.learner.groups_per_step * (self.queue.max_staleness + 1):
            raise ValueError(
                f"queue.max_groups {self.queue.max_groups} cannot hold the "
                f"{self.queue.max_staleness + 1} x {self.learner.groups_per_step} groups in flight"
            )
        return self
