"""What an update costs by arithmetic: FLOPs to sample and to train, and what lies in the memory of a GPU.

FLOPs of passes are counted (services/planning/published.py). How fast a GPU computes them is assumed: `RATE`.
Not in it are text encoders and VAE. Memory is that of tensors; each process takes about a GiB more.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.config import Config, LoraConfig
from services.planning.published import GIB, PassCost, Published, needed_passes
from services.planning.rewards import reward_gib

RATE = 300e12
"""FLOP/s of one GPU: about 45 % of what large bfloat16 matmuls reach on an H100."""
COPIES = 7
"""Of what is trained, in float32: the weights, their gradient, two moments, EMA, reference, one in flight."""
MOMENTS_8BIT = 2.03
"""Bytes of a trained weight's two moments with `adamw8bit` (docs/memory.md)."""
VAE_GIB = 0.2


@dataclass(frozen=True)
class Work:
    """Of an update, in FLOPs."""

    images: int
    sampling: float
    training: float
    groups: int

    @property
    def group_training(self) -> float:
        return self.training / self.groups


def work_of(config: Config, cost: PassCost) -> Work:
    """Raises ConfigError for an objective whose passes are not counted."""
    rollout, learner = config.rollout, config.learner
    images = rollout.group_size * learner.groups_per_step
    needed = needed_passes(config)
    # A group in pieces is passed through once more for its weight.
    again = config.objective.timesteps.per_update if micro_batch(config) < rollout.group_size else 0
    if learner.gradient_checkpointing:
        again += needed["train"]
    evaluations = 2 * rollout.steps - 1 if rollout.solver == "heun" else rollout.steps
    return Work(
        images=images,
        sampling=images * evaluations * (2 if rollout.guidance > 1 else 1) * cost.forward,
        training=images * (needed["train"] * cost.train + (needed["forward"] + again) * cost.forward),
        groups=learner.groups_per_step,
    )


def adapters(config: Config) -> LoraConfig | None:
    """None: every weight is trained."""
    return config.model.lora if config.model.train == "lora" else None


def micro_batch(config: Config) -> int:
    """`auto` counts as the whole group, which it is where that fits."""
    asked = config.learner.micro_batch
    return config.rollout.group_size if asked == "auto" else asked


@dataclass(frozen=True)
class Memory:
    """GiB."""

    sampler: float
    """Of a rollout worker, and of the evaluator: denoiser, text encoders that are on its device, VAE."""
    rewards: float
    """Networks of the rewards that are on a GPU, one replica of each."""
    rank: float
    """Of a learner process, without activations; all of them together with `learner.sharding: fsdp`."""
    activations: float
    """Of a micro-batch, as autograd would keep them; 0 where they are computed again or kept elsewhere."""


def memory_of(config: Config, model: Published, cost: PassCost) -> Memory:
    section, learner = config.model, config.learner
    frozen = 2 if section.dtype == "bfloat16" else 4
    full = section.train == "full"
    weights = cost.parameters * (4 if full else frozen)
    # Text encoders that are offloaded are there while a prompt is encoded.
    encoders = model.text_billions * 1e9 * frozen if section.text_encoders in ("device", "offload") else 0
    trained = COPIES * 4 - (8 - MOMENTS_8BIT if learner.optimizer == "adamw8bit" else 0)
    # Trained whole, the weights are among the copies; the base is there where the objective needs it.
    base = weights if not full or config.objective.needs_base else 0
    recomputed = learner.gradient_checkpointing or learner.activation_offload
    kept = 0 if recomputed else micro_batch(config) * cost.activations * frozen / 2
    return Memory(
        sampler=(weights + encoders) / GIB + VAE_GIB,
        rewards=sum(reward_gib(reward) for reward in config.rewards),
        rank=(base + trained * cost.trained) / GIB,
        activations=kept / GIB,
    )
