"""The configuration of a run: one YAML file, one pydantic model, nothing untyped.

Promises
- Every field has a type, a range, a unit where it has one, and a one-line meaning.
- Unknown keys, wrong types and impossible combinations are refused with the path in the YAML.
- The model is frozen: a run cannot change its configuration under itself.
- Secrets are not in here: only the names of environment variables or files that hold them.

Loading, overrides and error text are in services/config_file.py. This file is one flat list of settings,
longer than others because the reference documentation is generated from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

RunName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
RewardName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class Section(BaseModel):
    """Base of every section: frozen, closed, documented by the docstrings of its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class RunConfig(Section):
    name: RunName = "run"
    """Names the run in Redis keys, Ray actors and dashboards."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Prompts, initial noise, timesteps and training noise follow from it."""
    directory: Path = Path("runs")
    """Run directories are made in here, as `<name>-<UTC time>`."""


class LoraConfig(Section):
    rank: int = Field(default=64, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(default=128.0, gt=0)
    """Scale of each adapter is alpha / rank."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    """Endings of the module names that get an adapter."""


class ModelConfig(Section):
    path: str
    """Directory in diffusers format, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    train: Literal["lora", "full"] = "lora"
    """Train LoRA adapters, or every weight of the transformer."""
    lora: LoraConfig = LoraConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen weights. Trained weights are float32."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a GPU where there is one."""
    max_sequence_length: int = Field(default=256, ge=1, le=512)
    """T5 tokens of the prompt condition."""
    height: int = Field(default=512, ge=8)
    """Pixels."""
    width: int = Field(default=512, ge=8)
    """Pixels."""


class PromptsConfig(Section):
    source: Literal["words", "file"] = "file"
    """`words`: the quickstart's endless text-rendering prompts; `file`: one prompt a line, or JSONL."""
    path: Path | None = None
    """For `file`: .txt with one prompt a line, or .jsonl with {prompt, ...metadata} objects."""

    @model_validator(mode="after")
    def _file_has_a_path(self) -> PromptsConfig:
        if self.source == "file" and self.path is None:
            raise ValueError("source 'file' needs a path")
        if self.source == "words" and self.path is not None:
            raise ValueError("source 'words' makes its own prompts: leave path out")
        return self


class RolloutConfig(Section):
    workers: int = Field(default=1, ge=1)
    """Rollout actors, each with the whole model."""
    group_size: int = Field(default=16, ge=2)
    """Samples a group, G."""
    solver: Literal["dpmsolver++", "euler"] = "dpmsolver++"
    """ODE solver: DPM-Solver++ 2M multistep, or Euler."""
    steps: int = Field(default=10, ge=2)
    """Solver steps (function evaluations) a sample."""
    shift: float = Field(default=3.0, gt=0)
    """Flow shift of the sigma schedule; training uses the same schedule."""
    guidance: float = Field(default=1.0, ge=1.0)
    """Classifier-free guidance scale of the rollout; 1 is CFG-free."""
    decode_batch: int = Field(default=16, ge=1)
    """Images the VAE decodes at once."""
    threads: int = Field(default=1, ge=1)
    """Torch threads of a worker."""
    num_cpus: float = Field(default=1.0, ge=0)
    """Ray CPUs a worker reserves."""
    num_gpus: float = Field(default=0.0, ge=0)
    """Ray GPUs a worker reserves."""
    max_restarts: int = Field(default=5, ge=0)
    """Restarts of one worker before the run fails with its last error."""


def _login(url: str) -> tuple[str | None, str | None]:
    """User and password inside an address; Redis clients take them from its query too."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    return parts.username or query.get("username"), parts.password or query.get("password")


_FOR_APP = ("args", "replicas", "threads", "num_cpus", "num_gpus")
"""Settings of a reward that only a server started by the driver heeds."""


class RewardConfig(Section):
    name: RewardName
    """Names the reward in metrics and groups."""
    app: str | None = None
    """A scorer of reward_servers/scorers that the driver serves itself (`ocr`, `ocr_tesseract`)."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that scorer, for `app`."""
    url: str | None = None
    """Or: the address of a running reward server, up to and without /v1."""
    token_env: str | None = None
    """Environment variable that holds the bearer token for `url`."""
    weight: float = 1.0
    """Weight in the total reward."""
    required: bool = True
    """A required reward that fails dead-letters the group; an optional one drops its term for the group.
    Evaluations require every reward."""
    heldout: bool = False
    """Scored and reported, never trained."""
    every: int = Field(default=1, ge=1)
    """For a held-out reward: score the groups of every so many ordinals only, to save its time."""
    batching: Literal["request", "dynamic"] = "request"
    """`request`: a request is scored as a unit, or by a batch-invariant scorer; `dynamic`: requests may be
    merged. A server at `url` decides for itself: with `request` one that breaks this is refused."""
    deadline_s: float = Field(default=60.0, gt=0)
    """Seconds for one group's scores, retries included."""
    replicas: int = Field(default=1, ge=1)
    """Serve replicas, for `app`."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one replica, for `app`."""
    num_cpus: float = Field(default=0.5, ge=0)
    """Ray CPUs a replica reserves, for `app`."""
    num_gpus: float = Field(default=0.0, ge=0)
    """Ray GPUs a replica reserves, for `app`."""

    @model_validator(mode="after")
    def _one_place(self) -> RewardConfig:
        if (self.app is None) == (self.url is None):
            raise ValueError(f"reward {self.name!r} needs either app or url, and not both")
        if self.every > 1 and not self.heldout:
            raise ValueError(f"reward {self.name!r}: every > 1 is for held-out rewards only")
        if self.url is None:
            if self.token_env is not None:
                raise ValueError(
                    f"reward {self.name!r}: token_env is for url; leave it out: app gets a token from the run"
                )
            return self
        if any(_login(self.url)):
            raise ValueError(
                f"reward {self.name!r}: url holds a user or a password, which config.yaml and logs would "
                "show; leave them out and name the variable that holds a bearer token in token_env"
            )
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"reward {self.name!r}: url {self.url!r} must begin with http:// or https://")
        # config.yaml of a run holds every key: what is there at its default was asked for by nobody.
        defaults = RewardConfig.model_construct(name=self.name)
        ignored = [name for name in _FOR_APP if getattr(self, name) != getattr(defaults, name)]
        if ignored:
            raise ValueError(
                f"reward {self.name!r}: {', '.join(ignored)} would do nothing for a server at url, only for "
                "one that the driver starts (app); leave out, or keep at the default"
            )
        return self


class AdvantageConfig(Section):
    std: Literal["group", "step"] = "group"
    """Divide by the standard deviation of the group, or of the whole step."""
    epsilon: float = Field(default=1e-4, gt=0)
    """Added to the standard deviation."""
    clip: float = Field(default=5.0, gt=0)
    """Advantages are clamped to +- this."""


class TimestepConfig(Section):
    first: int = Field(default=7, ge=1)
    """Train on the first (noisiest) this many solver steps: the paper's timestep clip."""
    per_update: int = Field(default=4, ge=1)
    """Distinct timesteps drawn without replacement for an update, shared by all its groups."""

    @model_validator(mode="after")
    def _enough(self) -> TimestepConfig:
        if self.per_update > self.first:
            raise ValueError(f"per_update {self.per_update} exceeds first {self.first}")
        return self


class ObjectiveConfig(Section):
    name: Literal["dgpo"] = "dgpo"
    """Direct Group Preference Optimization (arXiv 2510.08425)."""
    beta: float = Field(default=100.0, gt=0)
    """Strength of the group preference: the group weight is sigmoid(beta * S_g)."""
    clip_range: float | None = Field(default=1e-2, gt=0)
    """PPO-style clip of exp(d_old - d); null switches it off."""
    kl: float = Field(default=0.0, ge=0)
    """Weight of mean((v - v_base)^2), v_base from the frozen base model."""
    kl_cfg: float = Field(default=1.0, ge=1.0)
    """Guidance under which the frozen base's velocity is taken (mode 2a); 1 is without guidance."""
    reference: Literal["frozen", "ema"] = "ema"
    """The model DGPO compares with: the frozen base, or an EMA of the policy."""
    reference_decay: float = Field(default=0.3, ge=0, lt=1)
    """Largest EMA decay of the reference; 0 makes it the policy at the start of the update."""
    reference_ramp: float = Field(default=0.001, gt=0)
    """Decay at update k is min(reference_decay, reference_ramp * k)."""
    switch_step: int | None = Field(default=None, ge=0)
    """From this update on rollouts use the EMA reference's weights; null: always the current ones."""
    timesteps: TimestepConfig = TimestepConfig()
    shared_noise: bool = True
    """One training noise for all samples of a group and timestep (the paper's), or one a sample."""

    @model_validator(mode="after")
    def _possible(self) -> ObjectiveConfig:
        if self.switch_step is not None and self.reference != "ema":
            raise ValueError("switch_step needs reference 'ema': there is no EMA to switch to")
        if self.kl_cfg > 1 and self.reference != "frozen" and self.kl == 0:
            raise ValueError("kl_cfg has no effect without reference 'frozen' or kl > 0")
        return self


class LearnerConfig(Section):
    ranks: int = Field(default=1, ge=1, le=1)
    """Learner processes. This version trains on one rank."""
    groups_per_step: int = Field(default=8, ge=1)
    """Groups an update consumes."""
    max_steps: int = Field(default=100, ge=1)
    """Updates in all."""
    optimizer_steps: int = Field(default=1, ge=1)
    """Optimizer steps an update makes, over disjoint timesteps."""
    micro_batch: int = Field(default=16, ge=1)
    """Samples in one forward-backward. Smaller than a group is exact (deferred group weight)."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """AdamW learning rate at its peak."""
    warmup_steps: int = Field(default=0, ge=0)
    """Updates of linear warm-up."""
    final_learning_rate: float | None = Field(default=None, gt=0)
    """Cosine decay to this at max_steps; null keeps the rate constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """AdamW weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient norm is clipped to this."""
    ema_decay: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the EMA that is evaluated and exported."""
    ema_every: int = Field(default=8, ge=1)
    """Updates between two updates of that EMA; the last update always makes one."""
    threads: int = Field(default=1, ge=1)
    """Torch threads of the learner."""
    num_cpus: float = Field(default=1.0, ge=0)
    """Ray CPUs a rank reserves."""
    num_gpus: float = Field(default=0.0, ge=0)
    """Ray GPUs a rank reserves."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts of the learner by Ray Train before the run fails; what a restart cannot mend fails at once."""

    @field_validator("betas")
    @classmethod
    def _decays(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"each of {betas} must be at least 0 and less than 1")
        return betas


class QueueConfig(Section):
    url: str | None = None
    """redis:// or rediss:// address, with an ACL user (`rediss://worker@host`) but never a password; null
    starts an embedded Valkey server on loopback."""
    password_env: str | None = None
    """Environment variable that holds the password for `url`."""
    max_staleness: int = Field(default=1, ge=0)
    """Updates a group may lag behind; 0 is synchronous and bit-reproducible."""
    lease_s: float = Field(default=120.0, gt=0)
    """Seconds a worker may hold an ordinal between two renewals before it is issued again."""
    max_attempts: int = Field(default=3, ge=1)
    """Issues of one ordinal before it goes to the dead-letter stream."""
    max_dead: int = Field(default=8, ge=0)
    """Dead letters a run bears before it fails."""
    max_groups: int = Field(default=1024, ge=1)
    """Groups the queue holds at most."""
    max_bytes: int = Field(default=2 * 1024**3, ge=1024)
    """Payload bytes the queue holds at most."""
    take_deadline_s: float = Field(default=600.0, gt=0)
    """Seconds the learner waits for the groups of a step before it fails and names what is missing."""

    @model_validator(mode="after")
    def _no_password(self) -> QueueConfig:
        if self.url is None and self.password_env is not None:
            raise ValueError("password_env is for url; leave it out: the embedded server makes a password")
        if self.url is not None and _login(self.url)[1]:
            raise ValueError(
                "url holds a password, which config.yaml and logs would show; leave it out and name the "
                "variable that holds it in password_env"
            )
        return self


class CheckpointConfig(Section):
    every_steps: int = Field(default=10, ge=1)
    """Updates between checkpoints; one is always written at the end and when interrupted."""
    keep: int = Field(default=2, ge=1)
    """Complete checkpoints kept."""


class EvalConfig(Section):
    every_steps: int = Field(default=0, ge=0)
    """Updates between evaluations of the EMA weights on held-out prompts; 0: only before and after."""
    prompts: int = Field(default=64, ge=1)
    """Held-out prompts of the evaluations during training."""
    final_prompts: int = Field(default=320, ge=1)
    """Held-out prompts of the evaluations before and after training."""
    seed: int = Field(default=99, ge=0)
    """Held-out prompts and their initial noise follow from it."""
    path: Path | None = None
    """Held-out prompts for `prompts.source: file`; null skips evaluation there."""
    batch: int = Field(default=64, ge=1)
    """Held-out prompts sampled at once, one image each."""
    deadline_s: float = Field(default=1800.0, gt=0)
    """Seconds that the evaluation after training may take, one that still goes on then included."""
    num_cpus: float = Field(default=0.0, ge=0)
    """Ray CPUs the evaluator reserves."""
    num_gpus: float = Field(default=0.0, ge=0)
    """Ray GPUs the evaluator reserves."""


class TelemetryConfig(Section):
    samples_every: int = Field(default=10, ge=0)
    """Updates between two groups whose images are kept in samples/; 0 keeps none."""
    tensorboard: bool = True
    """Write TensorBoard events into the run directory."""
    heartbeat_s: float = Field(default=2.0, gt=0)
    """Seconds between two heartbeats of a part."""


class ClusterConfig(Section):
    address: str | None = None
    """Ray address to join; null joins RAY_ADDRESS if it is set, else starts Ray on loopback."""
    dashboard: bool = False
    """Start the Ray dashboard (loopback) with a Ray that this run starts."""
    object_store_mb: int = Field(default=256, ge=80)
    """Object store of a Ray that this run starts, MiB."""
    serve_port: int = Field(default=0, ge=0, le=65535)
    """Port of the reward servers that this run starts; 0 takes a free one."""
    start_deadline_s: float = Field(default=180.0, gt=0)
    """Seconds for each part to become ready."""


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
