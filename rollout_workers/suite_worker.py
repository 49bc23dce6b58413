"""The Ray actor of a suite's evaluation: samples and scores whole shards.

Promises
- A shard's images and scores follow from the weights, the configuration, its prompts and seeds alone: not
  from which worker made it, or what it made before.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from policy import load_policy
from rollout_workers.evaluation import sample_and_score
from rollout_workers.scoring import RewardServers
from services.config import Config
from services.config_file import ConfigError
from services.context import RewardPlace
from services.messages import Message, Prompt


class SuiteWork(Message):
    """What every worker of an evaluation knows."""

    config: Config
    rewards: dict[str, RewardPlace]
    weights: Path | None
    """File of the weights that are evaluated; None: those of the pipeline."""
    sha256: str | None
    """Of that file."""


class ShardTask(Message):
    """Images to make: one for each seed of each prompt."""

    number: int
    prompts: tuple[Prompt, ...]
    seeds: tuple[tuple[int, ...], ...]
    """Of each prompt, equally many."""


class ShardScores(Message):
    """What was made, prompt by prompt and sample by sample; the images travel beside it."""

    number: int
    rewards: dict[str, tuple[float, ...]]
    details: dict[str, tuple[dict[str, Any], ...]]


class SuiteWorker:
    """One worker.

    Args:
        work: SuiteWork as JSON.
    """

    def __init__(self, work: str) -> None:
        told = SuiteWork.model_validate_json(work)
        self._config = told.config
        torch.set_num_threads(told.config.rollout.threads)
        self._policy = load_policy(
            told.config.model, text_encoders=True, vae=True, base=False, seed=told.config.run.seed
        )
        if told.weights is not None:
            self._policy.install(_proven(told.weights, told.sha256))
        self._scorer = RewardServers(told.config.rewards, told.rewards)

    def make(self, task: str) -> tuple[NDArray[np.uint8], str]:
        """The images of a ShardTask (JSON) and its ShardScores (JSON).

        Raises:
            RewardError: a reward could not be had; there is no shard without every score.
        """
        told = ShardTask.model_validate_json(task)
        prompts = [prompt for prompt, seeds in zip(told.prompts, told.seeds, strict=True) for _ in seeds]
        flat = [seed for seeds in told.seeds for seed in seeds]
        images, scores = sample_and_score(self._policy, self._scorer, self._config, prompts, flat)
        made = ShardScores(number=told.number, rewards=scores.rewards, details=scores.details)
        return images, made.model_dump_json()


def _proven(file: Path, sha256: str | None) -> dict[str, torch.Tensor]:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise ConfigError(f"{file}: its sha256 is {found}, that of the evaluation {sha256}: it has changed")
    return load_file(file)
