"""A family under test: its tiny pipeline on disk, our policy of it and the stock pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from tiny_pipelines import Tiny

from policy import Policy, load_policy
from policy.loading import align
from policy.pipeline_policy import PipelinePolicy
from rollout_workers.sampling import sample
from services.config import ModelConfig, RolloutConfig

PROMPT = "a red cube"
SEEDS = (4, 5)


@dataclass(frozen=True)
class Case:
    name: str
    tiny: Tiny
    directory: Path

    def config(self, **changes: Any) -> ModelConfig:
        return self.tiny.config(self.directory, **changes)

    def load(self, *, seed: int = 0, **changes: Any) -> PipelinePolicy:
        return load_policy(self.config(**changes), text_encoders=True, vae=True, seed=seed)

    def stock(self) -> Any:
        absent = dict.fromkeys(self.tiny.absent)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(self.directory, **absent)
        pipeline.set_progress_bar_config(disable=True)
        align(pipeline)
        return pipeline

    def rollouts(self) -> list[RolloutConfig]:
        """As the stock scheduler steps, plain and guided; and Euler where that is another."""
        settings = [{}, {"guidance": 2.5}]
        if self.tiny.rollout["solver"] != "euler":
            settings.append({"solver": "euler", "guidance": 2.5})
        return [self.tiny.sampling(**changes) for changes in settings]


def ours(policy: Policy, rollout: RolloutConfig) -> NDArray[np.uint8]:
    latents = sample(policy, policy.encode(PROMPT), policy.negative(), SEEDS, rollout)
    return policy.decode(latents, batch=2)


def theirs(pipeline: Any, policy: PipelinePolicy, rollout: RolloutConfig) -> NDArray[np.uint8]:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    arguments = policy.call_arguments(rollout)
    images = pipeline(PROMPT, num_images_per_prompt=len(SEEDS), generator=generators, **arguments).images
    return np.stack([np.asarray(image) for image in images])


def differ(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    return int(np.abs(one.astype(int) - other).max())
