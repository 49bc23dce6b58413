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
EQUAL = 1e-9
"""Scores of a group that differ by less are equal: of the largest of them, or of 1 where that is larger. Sums
of the same terms in another order differ by their rounding."""
AT_THE_MEAN = 1e-12
"""A score that is nearer to the mean is neither better nor worse; small enough that in a group of hundreds
whose scores are not equal some are."""


@dataclass(frozen=True)
class Advantages:
    """Of the groups of one update."""

    values: Tensor
    """(groups, G) float64, zero mean in each row before the clamp."""
    totals: Tensor
    """(groups, G) float64 total rewards."""
    live: Tensor
    """(groups,) bool: the group has a preference; false where all total rewards are equal (`EQUAL`)."""


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
        total = total + reward.term(column)
    if not bool((total.abs() < LARGEST_TOTAL).all()):
        raise ValueError(
            f"a total reward is beyond {LARGEST_TOTAL:g}: {total.tolist()}; check rewards[].weight and range"
        )
    return total


def preferences(
    rewards: Sequence[Mapping[str, Sequence[float]]], trained: Sequence[RewardConfig], config: AdvantageConfig
) -> Tensor:
    """What the samples of each group are ranked by.

    Args:
        rewards: of each group; `total_rewards` has accepted them.

    Returns:
        (groups, G) float64: the total rewards, or with `combine: normalized` the weighted sum of rewards that
        were centred and divided by their standard deviation, of the group or of the step as `std` says.
    """
    if config.combine == "sum":
        return torch.stack([total_rewards(group, trained) for group in rewards])
    result: Tensor | None = None
    for reward in trained:
        having = [place for place, group in enumerate(rewards) if reward.name in group]
        if not having:
            continue
        scores = torch.tensor([rewards[place][reward.name] for place in having], dtype=torch.float64)
        if result is None:
            result = scores.new_zeros(len(rewards), scores.shape[1])
        result[having] += reward.weight * _normalized(scores, config)
    assert result is not None, "total_rewards refuses groups without a trained reward"
    return result


def group_advantages(totals: Tensor, config: AdvantageConfig) -> Advantages:
    """A_i = (r_i - mean of the group) / (std + epsilon), clamped.

    With `weights: equal` the better ones of a group of which n are better share G / 2 equally, and the worse
    ones -G / 2: the sum stays zero, as the partition function needs it, and the mean of |A_i| is one.

    Args:
        totals: (groups, G) float64, of `preferences`.
        config: std of the group or of all rewards of the step (biased, as published), epsilon, clamp.
    """
    values = _normalized(totals, config).clamp(-config.clip, config.clip)
    if config.weights == "equal":
        values = _split_evenly(values)
    return Advantages(values=values, totals=totals, live=differ(totals))


def differ(scores: Tensor) -> Tensor:
    """(groups,) bool: whether the scores (groups, G) of a group are not all equal (`EQUAL`)."""
    return scores.amax(dim=1) - scores.amin(dim=1) > EQUAL * _scale(scores)


def _scale(scores: Tensor) -> Tensor:
    """(groups,)"""
    return scores.abs().amax(dim=1).clamp(min=1)


def _normalized(scores: Tensor, config: AdvantageConfig) -> Tensor:
    """(groups, G): centred by group, divided by the deviation."""
    centred = scores - scores.mean(dim=1, keepdim=True)
    std = scores.std(correction=0) if config.std == "step" else scores.std(dim=1, correction=0, keepdim=True)
    # Means are off by rounding errors: zero means zero.
    away = (centred.abs() > AT_THE_MEAN * _scale(scores)[:, None]) & differ(scores)[:, None]
    return torch.where(away, centred / (std + config.epsilon), torch.zeros_like(scores))


def _split_evenly(values: Tensor) -> Tensor:
    better, worse = (values > 0).to(values), (values < 0).to(values)
    half = values.shape[1] / 2
    share = better * (half / better.sum(dim=1, keepdim=True).clamp(min=1))
    return share - worse * (half / worse.sum(dim=1, keepdim=True).clamp(min=1))
