"""What an update reports; names are those of the rows in metrics.jsonl (services/metrics.py `UpdateRow`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.config import RewardConfig

Spread = dict[str, float]
"""Of the samples `mean`, `p10`, `p50` and `p90`; `std`: the mean of that within a group."""
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


@dataclass(frozen=True)
class UpdateMetrics:
    """Means are over the (group, timestep) pairs that gave a gradient; None where nothing was measured."""

    loss: float | None
    dsm: float | None
    """DSM error of the policy."""
    group_weight: float | None
    """sigmoid(beta * S_g)."""
    group_score: float | None
    """S_g."""
    clip_fraction: float | None
    """Share of samples whose gradient was cut."""
    kl: float | None
    grad_norm: float | None
    """Before clipping, mean over the optimizer steps."""
    learning_rate: float
    micro_batch: int
    """Samples in one forward-backward."""
    zero_variance_groups: int
    """Groups whose samples all had the same total reward."""
    dropped_terms: dict[str, int]
    """Optional reward -> groups that were trained without it, because it had failed."""
    reward: Spread
    """Of the total reward."""
    rewards: dict[str, Spread]
    """By reward name, held-out ones too."""
    seconds: dict[str, float]
    """By phase: reference, forward, backward, optimizer, ema; of several ranks, rank 0's, and ranks."""

    def row(self) -> dict[str, Any]:
        """The fields of an update's row that the learner's arithmetic knows."""
        same = (
            *("loss", "dsm", "group_weight", "group_score", "clip_fraction", "kl"),
            *("grad_norm", "learning_rate", "micro_batch"),
        )
        return {name: getattr(self, name) for name in same} | {
            "reward_mean": self.reward["mean"],
            "reward_std": self.reward["std"],
            "rewards": self.rewards,
            "zero_variance_groups": self.zero_variance_groups,
            "dropped_terms": self.dropped_terms,
            "update": {f"{phase}_s": seconds for phase, seconds in self.seconds.items()},
        }


def spread(groups: Sequence[Tensor]) -> Spread:
    """Of one reward: (G,) scores a group."""
    scores = [scores.to(torch.float64) for scores in groups]
    within = torch.stack([one.std(correction=0) for one in scores])
    together = torch.cat(scores)
    found = torch.quantile(together, together.new_tensor(list(QUANTILES.values())))
    quantiles = dict(zip(QUANTILES, found.tolist(), strict=True))
    return {"mean": float(together.mean()), "std": float(within.mean()), **quantiles}


def dropped_terms(
    groups: Sequence[Mapping[str, Sequence[float]]], trained: Sequence[RewardConfig]
) -> dict[str, int]:
    """Trained reward -> groups without it; those that no group lacks are left out."""
    counts = {reward.name: sum(reward.name not in group for group in groups) for reward in trained}
    return {name: count for name, count in counts.items() if count}


def reward_spreads(groups: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Spread]:
    """By reward name, over the groups that have it."""
    names = sorted({name for rewards in groups for name in rewards})
    return {
        name: spread(
            [torch.as_tensor(rewards[name], dtype=torch.float64) for rewards in groups if name in rewards]
        )
        for name in names
    }
