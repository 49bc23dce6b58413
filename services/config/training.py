"""The sections that say what is trained and how: model, rollouts, advantages and learner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from services.config.placement import AcceleratorType, CustomResources, Placement
from services.config.section import Section


class LoraConfig(Section):
    rank: int = Field(default=64, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(default=128.0, gt=0)
    """Scale of each adapter is alpha / rank."""
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Endings of the module names that get an adapter; null: the attention projections of the model's family
    (docs/models.md)."""


class ModelConfig(Section):
    path: str
    """Directory in diffusers format, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    train: Literal["lora", "full"] = "lora"
    """Train LoRA adapters, or every weight of the transformer."""
    lora: LoraConfig = LoraConfig()
    """For `train: lora`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen weights. Trained weights are float32."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a GPU where there is one."""
    compile: bool = False
    """Compile the blocks of the transformer with torch.compile where it runs on a GPU; on a CPU nothing is
    compiled. What was compiled is kept for the next process (docs/models.md). Not with `learner.sharding`."""
    text_encoders: Literal["device", "offload", "cpu", "cached"] = "device"
    """Where text encoders are: on the device; on the CPU, but for the time of an encoding (`offload`, for
    large ones); always on the CPU; or nowhere: encoded prompts are kept on disk (`cached`), and encoders are
    loaded only for prompts that are not there (docs/memory.md)."""
    condition_cache: Path | None = None
    """Directory of encoded prompts, for all processes and nodes; null: `conditions` in run.directory."""
    embedded_guidance: float | None = Field(default=None, ge=1)
    """Guidance that a guidance-distilled model (FLUX.1-dev) is told, in rollouts and training; null: 3.5."""
    max_sequence_length: int = Field(default=256, ge=1, le=512)
    """Text tokens of the prompt condition: of T5, Gemma or Qwen; the CLIP encoders have their own length."""
    height: int = Field(default=512, ge=8)
    """Pixels."""
    width: int = Field(default=512, ge=8)
    """Pixels."""

    @field_validator("condition_cache")
    @classmethod
    def _absolute(cls, place: Path | None) -> Path | None:
        # Once, where the run is started: other processes have other working directories.
        return None if place is None else place.absolute()

    @model_validator(mode="after")
    def _caching(self) -> ModelConfig:
        if self.condition_cache is not None and self.text_encoders != "cached":
            raise ValueError(
                f"condition_cache is for text_encoders 'cached', not {self.text_encoders!r}: leave it out"
            )
        return self


class RolloutConfig(Section):
    workers: int = Field(default=1, ge=1)
    """Rollout actors, each with the whole model."""
    group_size: int = Field(default=16, ge=2)
    """Samples a group, G."""
    solver: Literal["dpmsolver++", "euler", "heun", "sde"] = "dpmsolver++"
    """ODE solver: DPM-Solver++ multistep, Euler or Heun; or `sde`, Flow-GRPO's stochastic sampler on Euler's
    steps."""
    order: int | None = Field(default=None, ge=1, le=3)
    """Order of dpmsolver++; null: 2."""
    noise_level: float | None = Field(default=None, gt=0)
    """Of sde: its noise is this times sqrt(sigma / (1 - sigma)); null: 0.7."""
    steps: int = Field(default=10, ge=2)
    """Solver steps a sample; each evaluates the model once, those of heun but the last twice."""
    shift: float = Field(default=3.0, gt=0)
    """Flow shift of the sigma schedule; training uses the same schedule."""
    sigmas: Literal["scheduler", "fractions", "vp"] = "scheduler"
    """Where the steps are before the shift: the scheduler's own, from 1 to 1/1000 (SD3, SANA); 1, (n-1)/n,
    ..., 1/n (FLUX, Qwen-Image); or those of SDXL's discrete noise schedule, which has no shift."""
    terminal: float | None = Field(default=None, gt=0, lt=1)
    """Stretch the shifted sigmas so that the last is this (Qwen-Image has 0.02); null: leave them."""
    guidance: float = Field(default=1.0, ge=1.0)
    """Classifier-free guidance scale of the rollout; 1 is CFG-free."""
    decode_batch: int = Field(default=16, ge=1)
    """Images the VAE decodes at once."""
    probe_tolerance: float | None = Field(default=None, gt=0, lt=1)
    """How far a worker's velocity may be from the learner's with the same weights, relative (see
    `learner.probe_every`); null: 0.003 with dtype float32, 0.05 with bfloat16."""
    threads: int = Field(default=1, ge=1)
    """Torch threads of a worker."""
    num_cpus: float = Field(default=1.0, ge=0)
    """Ray CPUs a worker reserves."""
    num_gpus: float = Field(default=0.0, ge=0)
    """Ray GPUs a worker reserves."""
    accelerator_type: AcceleratorType | None = None
    """Only on nodes with this accelerator, by Ray's name, such as H100; null: on any."""
    resources: CustomResources = Field(default_factory=dict)
    """Custom Ray resources a worker reserves beside, by name: only nodes that have them hold it."""
    placement: Placement = "pack"
    """Workers on as few nodes as hold them, or on as many as there are. It is planned for those that a run
    starts with; one that is made later, and those of `dgpo eval`, go where Ray has room (`spread`: round the
    nodes)."""
    max_restarts: int = Field(default=5, ge=0)
    """Restarts of one worker, and of the evaluator, before the run fails with the last error."""
    hang_s: float = Field(default=600.0, gt=0)
    """Seconds that a worker may be at one thing (loading the model, sampling a group, installing weights,
    waiting for scores) before it is taken for hung: its stacks go into its log, and it is made anew."""

    @model_validator(mode="after")
    def _heeded(self) -> RolloutConfig:
        for key, solver in (("order", "dpmsolver++"), ("noise_level", "sde")):
            if getattr(self, key) is not None and self.solver != solver:
                raise ValueError(f"{key} is for solver {solver!r}, not {self.solver!r}: leave it out")
        if self.solver not in ("euler", "sde"):
            if self.sigmas != "scheduler":
                raise ValueError(
                    f"sigmas {self.sigmas!r} is for solvers 'euler' and 'sde', not {self.solver!r}"
                )
            if self.terminal is not None:
                raise ValueError(
                    f"terminal is for solvers 'euler' and 'sde', not {self.solver!r}: leave it out"
                )
        if self.sigmas == "vp" and (self.shift != 1 or self.terminal is not None):
            raise ValueError("sigmas 'vp' has no flow shift: set shift to 1, and leave terminal out")
        return self


class AdvantageConfig(Section):
    std: Literal["group", "step"] = "group"
    """Divide by the standard deviation of the group, or of the whole step."""
    epsilon: float = Field(default=1e-4, gt=0)
    """Added to the standard deviation."""
    combine: Literal["sum", "normalized"] = "sum"
    """Several rewards: their weighted sum; or each divided by its own deviation first, so that a reward with
    a wide scale does not drown the others."""
    weights: Literal["advantage", "equal"] = "advantage"
    """A sample counts by its advantage (the paper's), or every better and every worse one equally."""
    clip: float = Field(default=5.0, gt=0)
    """Advantages are clamped to +- this."""


class LearnerConfig(Section):
    ranks: int = Field(default=1, ge=1)
    """Learner processes that share the groups of an update (docs/ranks.md)."""
    sharding: Literal["none", "fsdp"] = "none"
    """Each rank holds the whole model; or, with `fsdp`, a part of every weight, gradient, moment and average,
    for full fine-tuning on several ranks. Only a block's weights are then whole, while it runs."""
    rank_deadline_s: float = Field(default=1800.0, gt=0)
    """Seconds that ranks wait for each other, the slowest one's share of an update included, before the
    learner is restarted with what was waited for in its log."""
    compare_every: int = Field(default=10, ge=1)
    """Updates between two comparisons of what all ranks hold, which must be the same bit for bit: the trained
    weights, or what is whole beside shards; before a checkpoint it is always compared."""
    probe_every: int = Field(default=1, ge=0)
    """Updates between two announcements of weights after whose install workers compare their velocity with
    the learner's; 0: they never do. It costs either side one forward pass of one sample."""
    publish_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which weights travel to rollout workers and the evaluator. bfloat16 halves the bytes; what samples
    is then the rounded policy. Checkpoints and exports keep float32."""
    publish_through: Literal["object_store", "shared_directory", "process_groups", "nccl"] = "object_store"
    """How they travel: Ray's object store; files in the run directory; or straight from the learner to each
    worker, so that no store has to hold them: by TCP (`process_groups`, over Gloo), or from GPU to GPU
    (`nccl`, which needs the extra `nccl`; docs/weights.md)."""
    groups_per_step: int = Field(default=8, ge=1)
    """Groups an update consumes."""
    max_steps: int = Field(default=100, ge=1)
    """Updates in all."""
    optimizer_steps: int = Field(default=1, ge=1)
    """Optimizer steps an update makes, over disjoint timesteps."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = 16
    """Samples in one forward-backward. Smaller than a group is exact (deferred group weight; with `fsdp` a
    forward pass of its own for the weight). `auto` tries before the first update how many of a group fit the
    GPU, halving from all of them, and keeps to what it found for the whole run (docs/memory.md); not with
    `fsdp`."""
    activation_offload: bool = False
    """Keep activations in host memory between forward and backward. DGPO with a KL (or `fsdp`) and a
    micro-batch below the group size then needs no pass of its own for the group weight; host memory grows
    with the group."""
    gradient_checkpointing: bool = False
    """Keep only what enters each block of the model, and compute the rest again in the backward pass: far
    less memory for one more forward pass, the same gradient bit for bit."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW with moments in float32, 8 bytes a trained weight; or in 8 bits (bitsandbytes), 2 bytes, not with
    `fsdp`. Tensors below 4096 elements keep float32."""
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
    accelerator_type: AcceleratorType | None = None
    """Only on nodes with this accelerator, by Ray's name, such as H100; null: on any."""
    resources: CustomResources = Field(default_factory=dict)
    """Custom Ray resources a rank reserves beside, by name: only nodes that have them hold it."""
    placement: Placement = "pack"
    """Ranks on as few nodes as hold them, where they talk fastest; or on as many as there are."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts of the learner by Ray Train before the run fails; what a restart cannot mend fails at once."""
    hang_s: float = Field(default=1800.0, gt=0)
    """Seconds that a rank may be at one thing (loading the model, an update, publishing, a checkpoint) before
    it is taken for hung: its stacks go into its log, and the learner is started anew."""

    @field_validator("betas")
    @classmethod
    def _decays(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"each of {betas} must be at least 0 and less than 1")
        return betas
