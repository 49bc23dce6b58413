"""Evaluation on held-out prompts: fixed prompts, fixed initial noise, the rollout's own solver and guidance.

Promises
- The same prompts and seeds before, during and after training, so that scores are paired: an evaluation of
  fewer prompts uses the first ones of the longer list.
- Every reward is asked for, held-out ones too; one that fails is an error, never a zero.
- Standard errors are over prompts (one sample a prompt).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy import Condition, Policy
from quickstart.diversity import diversity
from rollout_workers.sampling import sample
from rollout_workers.scoring import GroupScores, Scorer
from services.config import Config
from services.messages import Prompt
from services.metrics import Estimate
from services.prompts import sample_seeds

DIVERSITY_PROMPTS = 16


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    prompts: tuple[Prompt, ...]
    images: NDArray[np.uint8]
    """(prompts, H, W, 3)."""
    scores: GroupScores
    rewards: dict[str, Estimate]
    exact: dict[str, Estimate]
    diversity: dict[str, float]
    """By measure (quickstart/diversity.py); empty where it was not measured."""
    seconds: float


def evaluate(
    policy: Policy,
    scorer: Scorer,
    config: Config,
    prompts: Sequence[Prompt],
    *,
    with_diversity: bool = False,
) -> Evaluation:
    """Sample one image a prompt and score it with every reward.

    Args:
        policy: with the weights to evaluate installed.
        with_diversity: also sample whole groups for some prompts and measure how varied they are. Only where
            prompts are words: what is measured is colour and place of one word on its background.

    Raises:
        RewardError: a reward could not be had, be it optional or held out in training.
    """
    started = time.monotonic()
    varied: dict[str, float] = {}

    def measure_diversity() -> None:
        if with_diversity and config.prompts.source == "words":
            varied.update(_diversity(policy, config, prompts[:DIVERSITY_PROMPTS]))

    seeds = [sample_seeds(config.eval.seed, "eval", place, 1)[0] for place in range(len(prompts))]
    images, scores = sample_and_score(policy, scorer, config, prompts, seeds, while_scoring=measure_diversity)
    exact = {
        name: _estimate([float(item["exact"]) for item in items])
        for name, items in scores.details.items()
        if items and all("exact" in item for item in items)
    }
    return Evaluation(
        prompts=tuple(prompts),
        images=images,
        scores=scores,
        rewards={name: _estimate(values) for name, values in scores.rewards.items()},
        exact=exact,
        diversity=varied,
        seconds=time.monotonic() - started,
    )


def sample_and_score(
    policy: Policy,
    scorer: Scorer,
    config: Config,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    *,
    while_scoring: Callable[[], None] = lambda: None,
) -> tuple[NDArray[np.uint8], GroupScores]:
    """One image for each prompt and seed, in batches of `eval.batch`, and all its scores.

    Args:
        while_scoring: done between sampling the last batch and waiting for its scores.

    Returns:
        (prompts, H, W, 3) images, and their scores in the same order.

    Raises:
        RewardError: a reward could not be had.
    """
    images, pending = [], list[Future[list[GroupScores]]]()
    policy.prepare([prompt.text for prompt in prompts], negative=config.evaluation_rollout.guidance > 1)
    size, batch_size = config.rollout.group_size, config.eval.batch
    # As in a rollout worker: one batch is scored while the next is sampled.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="score") as background:
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            conditions = [policy.encode(prompt.text) for prompt in batch]
            images.append(_decoded(policy, config, conditions, seeds[first : first + batch_size]))
            pending.append(background.submit(_scores, scorer, images[-1], batch, size))
        while_scoring()
        scored = [part for scores in pending for part in scores.result()]
    rewards, details = dict[str, list[float]](), dict[str, list[dict[str, Any]]]()
    for part in scored:
        for name, values in part.rewards.items():
            rewards.setdefault(name, []).extend(values)
            details.setdefault(name, []).extend(part.details.get(name, ()))
    return np.concatenate(images), GroupScores(
        rewards={name: tuple(values) for name, values in rewards.items()},
        details={name: tuple(items) for name, items in details.items()},
    )


def _scores(
    scorer: Scorer, images: NDArray[np.uint8], prompts: Sequence[Prompt], size: int
) -> list[GroupScores]:
    return [
        scorer.score(images[start : start + size], prompts[start : start + size])
        for start in range(0, len(prompts), size)
    ]


def _diversity(policy: Policy, config: Config, prompts: Sequence[Prompt]) -> dict[str, float]:
    size = config.rollout.group_size
    groups = []
    for place, prompt in enumerate(prompts):
        seeds = sample_seeds(config.eval.seed, "diversity", place, size)
        groups.append(_decoded(policy, config, policy.encode(prompt.text), seeds))
    return diversity(np.concatenate(groups), size)


def _decoded(
    policy: Policy, config: Config, condition: Condition | Sequence[Condition], seeds: Sequence[int]
) -> NDArray[np.uint8]:
    rollout = config.evaluation_rollout
    negative = policy.negative() if rollout.guidance > 1 else None
    latents = sample(policy, condition, negative, seeds, rollout)
    return policy.decode(latents, batch=rollout.decode_batch)


def _estimate(values: Sequence[float]) -> Estimate:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean=mean)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean=mean, se=math.sqrt(variance / len(values)))
