"""The configuration of a run: one YAML file, one pydantic model, nothing untyped.

Promises
- Every field has a type, a range, a unit where it has one, and a one-line meaning.
- Unknown keys, wrong types and impossible combinations are refused with the path in the YAML.
- The model is frozen: a run cannot change its configuration under itself.
- Secrets are not in here: only the names of environment variables or files that hold them.

Here is the whole; its sections are in prompts.py, training.py and objectives.py (on what is trained, and how)
and parts.py (with whom, where). What an evaluation takes of it: evaluation.py.
Loading, overrides and error text are in services/config_file.py.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from services.config.objectives import (
    OBJECTIVES,
    AnyObjective,
    DgpoConfig,
    DiffusionNftConfig,
    FlowGrpoConfig,
    ObjectiveConfig,
    TimestepConfig,
    WithReference,
)
from services.config.parts import (
    CheckpointConfig,
    ClusterConfig,
    EvalConfig,
    GuardConfig,
    QueueConfig,
    QueueLogin,
    QueuePart,
    RewardConfig,
    RunConfig,
    TelemetryConfig,
)
from services.config.prompts import (
    ENDLESS,
    CurriculumConfig,
    MixedSourceConfig,
    PromptsConfig,
    PromptSourceConfig,
)
from services.config.section import Section
from services.config.training import (
    AdvantageConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    RolloutConfig,
)

__all__ = [
    "OBJECTIVES",
    "AdvantageConfig",
    "AnyObjective",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "CurriculumConfig",
    "DgpoConfig",
    "DiffusionNftConfig",
    "EvalConfig",
    "FlowGrpoConfig",
    "GuardConfig",
    "LearnerConfig",
    "LoraConfig",
    "MixedSourceConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "PromptSourceConfig",
    "PromptsConfig",
    "QueueConfig",
    "QueueLogin",
    "QueuePart",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "Sections",
    "TelemetryConfig",
    "TimestepConfig",
    "WithReference",
]


class Sections(Section):
    """All sections of a run, each of them right in itself."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    prompts: PromptsConfig
    rollout: RolloutConfig = RolloutConfig()
    rewards: tuple[RewardConfig, ...] = Field(min_length=1)
    advantage: AdvantageConfig = AdvantageConfig()
    objective: ObjectiveConfig = DgpoConfig()
    learner: LearnerConfig = LearnerConfig()
    queue: QueueConfig = QueueConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    guard: GuardConfig = GuardConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    cluster: ClusterConfig = ClusterConfig()


class Config(Sections):
    """A whole run: sections that go together."""

    @property
    def trained_rewards(self) -> tuple[RewardConfig, ...]:
        return tuple(reward for reward in self.rewards if not reward.heldout)

    @property
    def offline(self) -> bool:
        """Whether groups come from a recording: nothing is sampled, one feeder stands for the workers."""
        return self.prompts.source == "recorded"

    @property
    def learner_guides(self) -> bool:
        """Whether the learner evaluates a model under guidance, for which it encodes the empty prompt."""
        objective = self.objective
        return objective.guided_base > 1 or (objective.needs_trajectory and self.rollout.guidance > 1)

    @property
    def past_references(self) -> int:
        """References of past updates that the learner keeps for stale groups, and checkpoints hold."""
        objective = self.objective
        relative = isinstance(objective, WithReference) and objective.reference_of == "rollout"
        return self.queue.max_staleness if relative else 0

    @property
    def groups_deadline_s(self) -> float:
        """Seconds that the learner waits for the groups of a step; where parts take turns on one card, an
        evaluation may be in between, and any of them waits so long for its turn."""
        return self.queue.take_deadline_s + (self.eval.deadline_s if self.cluster.colocate else 0.0)

    @property
    def evaluation_rollout(self) -> RolloutConfig:
        """How evaluations and exported pipelines sample: as rollouts do, but never stochastically."""
        used = self.rollout.solver
        solver = self.eval.solver or ("euler" if used == "sde" else used)
        if solver == used:
            return self.rollout
        return self.rollout.model_copy(update={"solver": solver, "noise_level": None, "order": None})

    @model_validator(mode="after")
    def _possible(self) -> Config:
        names = [reward.name for reward in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"rewards: names must differ, got {names}")
        if not self.trained_rewards:
            raise ValueError("rewards: every reward is held out; at least one must be trained")
        idle = [reward.name for reward in self.trained_rewards if reward.weight == 0]
        if idle:
            raise ValueError(
                f"rewards: {', '.join(idle)} has weight 0 and trains nothing; set heldout: true to watch it"
            )
        slow = [one.name for one in self.rewards if one.deadline_s >= self.rollout.hang_s]
        if slow:
            raise ValueError(
                f"rewards: deadline_s of {', '.join(slow)} must be less than rollout.hang_s "
                f"{self.rollout.hang_s:g}: a worker that waits for them would be taken for hung"
            )
        if self.learner.micro_batch == "auto" and self.learner.activation_offload:
            raise ValueError(
                "learner.micro_batch: auto tries what fits on the GPU; with activation_offload it is host "
                "memory that may run out, which ends the process untold: give a number"
            )
        if self.learner.activation_offload and self.model.compile:
            raise ValueError(
                "learner.activation_offload with model.compile: compiled code decides itself what it keeps "
                "for the backward pass: set one of them to false"
            )
        heldout = [reward.name for reward in self.rewards if reward.heldout]
        unknown = sorted(set(self.guard.drop) - set(heldout))
        if unknown:
            raise ValueError(
                f"guard.drop names {', '.join(unknown)}; held-out rewards are: {', '.join(heldout) or 'none'}"
            )
        ranged = [reward.name for reward in self.rewards if reward.range is not None]
        if ranged and self.advantage.combine == "normalized":
            raise ValueError(
                f"rewards: range of {', '.join(ranged)} would do nothing with advantage.combine normalized: "
                "that brings every reward to the same scale itself: leave it out"
            )
        if self.rollout.probe_tolerance is not None and not self.learner.probe_every:
            raise ValueError(
                "rollout.probe_tolerance does nothing with learner.probe_every 0: leave it out, or set "
                "probe_every to the updates between two comparisons"
            )
        steps, picked = self.rollout.steps, self.objective.timesteps
        if picked.first is not None and picked.first > steps:
            raise ValueError(f"objective.timesteps.first {picked.first} exceeds rollout.steps {steps}")
        if picked.per_update % self.learner.optimizer_steps:
            raise ValueError(
                f"learner.optimizer_steps {self.learner.optimizer_steps} must divide "
                f"objective.timesteps.per_update {picked.per_update}"
            )
        group, micro = self.rollout.group_size, self.learner.micro_batch
        if micro != "auto" and micro % group and group % micro:
            raise ValueError(
                f"learner.micro_batch {micro} must divide rollout.group_size {group} or be a multiple of it"
            )
        self._check_ranks()
        self._check_colocated()
        self._check_nccl()
        self._check_objective()
        self._check_heldout()
        if self.offline and self.telemetry.record:
            raise ValueError(
                "telemetry.record with prompts.source 'recorded' would record the recording: set it to false"
            )
        if self.queue.max_groups < self.learner.groups_per_step * (self.queue.max_staleness + 1):
            raise ValueError(
                f"queue.max_groups {self.queue.max_groups} cannot hold the "
                f"{self.queue.max_staleness + 1} x {self.learner.groups_per_step} groups in flight"
            )
        return self

    def _check_heldout(self) -> None:
        """Held-out prompts come from one place."""
        prompts = self.prompts
        if self.eval.path is not None and prompts.source in ENDLESS:
            raise ValueError(
                f"eval.path with prompts.source {prompts.source!r}, which makes its held-out prompts itself: "
                "leave it out"
            )
        own = [f"prompts.{key}" for key in ("heldout_share", "heldout_split") if getattr(prompts, key)]
        own += [
            f"prompts.mix.{number}.{key}"
            for number, source in enumerate(prompts.mix)
            for key in ("heldout_share", "heldout_split", "heldout_path")
            if getattr(source, key)
        ]
        if self.eval.path is not None and own:
            raise ValueError(
                f"eval.path and {', '.join(own)} both say which prompts are held out: give one of them"
            )

    def _check_colocated(self) -> None:
        """What parts that take turns on one card cannot be."""
        if not self.cluster.colocate:
            return
        for key, found, wanted, why in (
            ("queue.max_staleness", self.queue.max_staleness, 0, "who trains and who samples take turns"),
            ("learner.ranks", self.learner.ranks, 1, "ranks train at the same time"),
            ("rollout.workers", self.rollout.workers, 1, "workers sample at the same time"),
            ("model.compile", self.model.compile, False, "compiled code keeps to memory that moves away"),
        ):
            if found != wanted:
                raise ValueError(f"cluster.colocate needs {key} {wanted}, not {found}: {why}")
        if self.offline:
            raise ValueError("cluster.colocate is for rollouts: with prompts.source 'recorded' leave it out")
        if (through := self.learner.publish_through) in ("process_groups", "nccl"):
            raise ValueError(
                f"cluster.colocate with learner.publish_through {through}: the learner would wait in its "
                "turn for a worker that takes the weights in its own: take object_store or shared_directory"
            )
        learner, rollout, evaluator = self.learner.num_gpus, self.rollout.num_gpus, self.eval.num_gpus
        parts = {"learner": learner, "rollout": rollout, "eval": evaluator}
        if any(parts.values()) and not all(parts.values()):
            none = ", ".join(f"{part}.num_gpus" for part, share in parts.items() if not share)
            raise ValueError(
                f"cluster.colocate: {none} is 0, and Ray may hide the card from a part that reserves "
                "nothing of it: give each a share, such as 0.3, or none of them one"
            )
        if (total := sum(parts.values())) > 1:
            raise ValueError(
                f"cluster.colocate: num_gpus of learner, rollout and eval add up to {total:g}, which takes "
                "more than one card: at most 1, with what rewards take of it"
            )

    def _check_nccl(self) -> None:
        """NCCL joins the learner's GPU to others, each of another."""
        if self.learner.publish_through != "nccl":
            return
        if self.model.device == "cpu":
            raise ValueError(
                "learner.publish_through nccl with model.device cpu: NCCL joins GPUs: take process_groups"
            )
        if self.learner.num_gpus < 1:
            raise ValueError(
                f"learner.publish_through nccl with learner.num_gpus {self.learner.num_gpus:g}: a worker may "
                "be on the same GPU, to which NCCL joins none: 1, or take process_groups"
            )
        parts = {"rollout": self.rollout.num_gpus if not self.offline else 1.0, "eval": self.eval.num_gpus}
        if none := ", ".join(f"{part}.num_gpus" for part, share in parts.items() if not share):
            raise ValueError(
                f"learner.publish_through nccl: {none} is 0, and NCCL brings weights to GPUs only: give a "
                "share of one, such as 0.5, or take process_groups"
            )

    def _check_ranks(self) -> None:
        """Impossible combinations of several ranks."""
        ranks, groups, device = self.learner.ranks, self.learner.groups_per_step, self.model.device
        if ranks > groups:
            raise ValueError(
                f"learner.ranks {ranks} exceeds learner.groups_per_step {groups}: groups are not split, so "
                "some ranks would never have one"
            )
        if ranks == 1 and self.learner.placement == "spread":
            raise ValueError("learner.placement spread with learner.ranks 1: one rank is in one place")
        if ranks > 1 and ":" in device:
            raise ValueError(
                f"model.device {device} would put all of {ranks} ranks on one GPU; with cuda or auto each "
                "takes the one that Ray gives it"
            )
        if self.learner.sharding == "none":
            return
        if ranks == 1:
            raise ValueError("learner.sharding fsdp divides the weights of several ranks: set learner.ranks")
        if self.model.train != "full":
            raise ValueError(
                "learner.sharding fsdp is for full fine-tuning: set model.train to full, or sharding to none "
                "(adapters are small, and the frozen weights beside them are not sharded)"
            )
        if 0 < self.learner.num_gpus < 1:
            raise ValueError(
                f"learner.sharding fsdp with learner.num_gpus {self.learner.num_gpus}: shards travel between "
                "GPUs of their own: set it to 1, or to 0 for the CPU"
            )
        if self.learner.optimizer != "adamw":
            raise ValueError(
                f"learner.sharding fsdp with learner.optimizer {self.learner.optimizer}: its moments come in "
                "blocks of 256, which do not follow the rows of a tensor, so that no other number of ranks "
                "could go on from a checkpoint; set optimizer to adamw (the ranks share its moments)"
            )
        if self.model.compile:
            raise ValueError(
                "learner.sharding fsdp with model.compile: what gathers the weights of a block cannot be "
                "compiled: set compile to false"
            )
        if self.learner.micro_batch == "auto":
            raise ValueError(
                "learner.sharding fsdp with learner.micro_batch auto: a rank that ran out of memory in a try "
                "would leave the others waiting in the same pass; set micro_batch to a number"
            )

    def _check_objective(self) -> None:
        """Impossible combinations of the objective and how its groups are sampled."""
        objective, rollout = self.objective, self.rollout
        if objective.needs_trajectory:
            if rollout.solver != "sde":
                raise ValueError(
                    f"objective {objective.name!r} needs the likelihoods of stochastic steps: set "
                    f"rollout.solver to sde (found {rollout.solver!r})"
                )
            first = objective.timesteps.first
            if first is None or first >= rollout.steps:
                raise ValueError(
                    f"objective.timesteps.first {first} must be below rollout.steps {rollout.steps}: the "
                    "last step of the stochastic sampler ends at sigma 0 and has no likelihood to train on"
                )
        if not isinstance(objective, DgpoConfig):
            return
        guided = rollout.guidance > 1
        if objective.cfg_free and guided:
            raise ValueError(
                "objective.cfg_free trains a model that is sampled without guidance, but rollout.guidance is "
                f"{rollout.guidance}: samples of a guided model say nothing of what reference "
                f"{objective.reference!r} with kl_cfg {objective.kl_cfg} is compared with; set "
                "rollout.guidance to 1, or cfg_free to false (mode 1)"
            )
        if objective.cfg_free is False and not guided:
            raise ValueError("objective.cfg_free is false (mode 1), which needs rollout.guidance above 1")
        if guided and objective.reference == "frozen" and objective.kl_cfg > 1:
            raise ValueError(
                f"rollout.guidance {rollout.guidance} with objective.kl_cfg "
                f"{objective.kl_cfg}: mode 2a is CFG-free, set rollout.guidance to 1"
            )
