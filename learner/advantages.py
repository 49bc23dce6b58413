"""From rewards to advantages: how much better than its group each sample is.

Promises
- Adding a constant to all rewards of a group, or permuting it, changes nothing but the order.
- An all-equal group has advantages of exactly zero and is counted, never divided by noise.
- A reward that is not finite is an error, never a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.config import AdvantageConfig, RewardConfig

LARGEST_TOTAL = 1e100
"""Its square is still a number: the standard deviation needs it."""


@dataclass(frozen=True)
class Advantages:
    """Of the groups of one update."""

    values: Tensor
    """(groups, G) float64, zero mean in each row before the clamp."""
    totals: Tensor
    """(groups, G) float64 total rewards."""
    live: Tensor
    """(groups,) bool: the group has a preference; false where all total rewards are equal."""


def total_rewards(rewards: Mapping[str, Sequence[float]], trained: Sequence[RewardConfig]) -> Tensor:
    """The weighted sum of the trained rewards of one group.

    Args:
        rewards: name -> G scores; held-out rewards may be in it and are left out.
        trained: the rewards that count. An optional one that is absent drops its term.

    Returns:
        (G,) float64.

    Raises:
        ValueError: a required reward is absent, all are, lengths differ, or a score is not finite.
    """
    missing = [reward.name for reward in trained if reward.required and reward.name not in rewards]
    present = [reward for reward in trained if reward.name in rewards]
    if missing or not present:
        raise ValueError(
            f"rewards {', '.join(missing or [reward.name for reward in trained])} are absent; the group has "
            f"{', '.join(sorted(rewards)) or 'none'}"
        )
    columns = [torch.as_tensor(rewards[reward.name], dtype=torch.float64) for reward in present]
    lengths = {len(column) for column in columns}
    if len(lengths) > 1:
        raise ValueError(f"rewards of one group have different lengths: {sorted(lengths)}")
    total = torch.zeros_like(columns[0])
    for reward, column in zip(present, columns, strict=True):
        if not bool(torch.isfinite(column).all()):
            raise ValueError(f"reward {reward.name} has a score that is not finite: {column.tolist()}")
        total = total + reward.weight * column
    if not bool((total.abs() < LARGEST_TOTAL).all()):
        raise ValueError(
            f"a total reward is beyond {LARGEST_TOTAL:g}: {total.tolist()}; check rewards[].weight"
        )
    return total


def group_advantages(totals: Tensor, config: AdvantageConfig) -> Advantages:
    """A_i = (r_i - mean of the group) / (std + epsilon), clamped.

    Args:
        totals: (groups, G) float64 total rewards.
        config: std of the group or of all rewards of the step (biased, as published), epsilon, clamp.
    """
    live = totals.amax(dim=1) > totals.amin(dim=1)
    centred = totals - totals.mean(dim=1, keepdim=True)
    std = totals.std(correction=0) if config.std == "step" else totals.std(dim=1, correction=0, keepdim=True)
    values = (centred / (std + config.epsilon)).clamp(-config.clip, config.clip)
    # The mean of equal numbers may be off by a rounding error: zero means zero.
    values = torch.where(live[:, None], values, torch.zeros_like(values))
    return Advantages(values=values, totals=totals, live=live)
