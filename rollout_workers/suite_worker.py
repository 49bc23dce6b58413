"""The Ray actor of a suite's evaluation: samples and scores whole shards.

Promises
- A shard's images and scores follow from the weights, the configuration, its prompts and seeds alone: not
  from which worker made it, or what it made before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from policy import load_policy
from policy.base_digest import base_digest
from rollout_workers.evaluation import sample_and_score
from rollout_workers.scoring import RewardServers
from services.checkpoint_parts import digest_of_part, read_part, sha256_of
from services.config import Config
from services.config_file import ConfigError
from services.context import RewardPlace
from services.exported_lora import LORA, check_base, lora_file, read_lora
from services.messages import Message, Prompt


class SuiteWork(Message):
    """What every worker of an evaluation knows."""

    config: Config
    rewards: dict[str, RewardPlace]
    weights: Path | None
    """Directory of the checkpoint or the exported LoRA that is evaluated; None: the pipeline's own weights
    are."""
    kind: str | None
    """Which of its weights (services/evaluate.py)."""
    digest: str | None
    """Of those (services/checkpoint_parts.py)."""
    base_digest: str | None = None
    """Of the base that a LoRA needs (policy/base_digest.py); None: any will do."""


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
        if told.weights is not None and told.base_digest is not None:
            found = base_digest(self._policy.transformer.state_dict())
            check_base(told.weights, told.base_digest, found, told.config.model.path)
        if told.weights is not None and told.kind is not None:
            self._policy.install(_proven(told.weights, told.kind, told.digest))
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


def _proven(place: Path, kind: str, digest: str | None) -> dict[str, torch.Tensor]:
    lora = kind == LORA
    found = sha256_of(lora_file(place)) if lora else digest_of_part(place, kind)
    if found != digest:
        raise ConfigError(
            f"{place}: the digest of {kind!r} is {found}, of the evaluation {digest}: it has changed"
        )
    return read_lora(place) if lora else read_part(place, kind)
