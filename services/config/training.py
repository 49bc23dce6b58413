"""The sections that say what is trained and how: model, prompts, rollouts, objective and learner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from services.config.section import Section


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
