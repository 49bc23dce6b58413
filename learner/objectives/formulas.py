"""The formulas of the objectives, term by term: pure functions, shapes in their docstrings. Those of DGPO:

    x_t  = (1 - sigma) x0 + sigma noise         d_i = mean((noise - x0 - v(x_t, t, c))^2)
    S_g  = (1/G) sum_i A_i (d_i - d_i')         loss = softplus(beta * S_g) / beta

where d' is the DSM error under the reference, and A_i are the advantages of a group of G samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dsm_error(velocity: Tensor, target: Tensor) -> Tensor:
    """(N,) mean over latent elements of (target - velocity)^2; both (N, C, h, w)."""
    return (target - velocity).square().flatten(1).mean(dim=1)


def clipped(dsm: Tensor, old_dsm: Tensor, advantages: Tensor, clip_range: float | None) -> Tensor:
    """(N,) bool: the sample has moved far enough in its preferred direction and gives no gradient.

    rho = exp(old_dsm - dsm); true where A > 0 and rho > 1 + c, or A < 0 and rho < 1 - c.
    """
    if clip_range is None:
        return torch.zeros_like(dsm, dtype=torch.bool)
    ratio = torch.exp(old_dsm - dsm)
    better = (advantages > 0) & (ratio > 1 + clip_range)
    worse = (advantages < 0) & (ratio < 1 - clip_range)
    return better | worse


def group_scores(dsm: Tensor, reference_dsm: Tensor, advantages: Tensor) -> Tensor:
    """S_g, how much worse the policy fits the preferred part of each group than the reference does.

    Args:
        dsm: (groups, G) DSM error of the policy.
        reference_dsm: the same under the reference.
        advantages: (groups, G), zero mean in each row.

    Returns:
        (groups,) (1/G) sum_i A_i (d_i - d_i').
    """
    return (advantages * (dsm - reference_dsm)).mean(dim=1)


def group_weights(scores: Tensor, beta: float) -> Tensor:
    """(groups,) sigmoid(beta * S_g): the derivative of the loss with respect to S_g."""
    return torch.sigmoid(beta * scores)


def group_losses(scores: Tensor, beta: float) -> Tensor:
    """(groups,) softplus(beta * S_g) / beta = -log sigmoid(-beta * S_g) / beta."""
    return F.softplus(beta * scores) / beta


def kl_penalty(velocity: Tensor, base_velocity: Tensor) -> Tensor:
    """(N,) mean over latent elements of (v - v_base)^2: the KL of two Gaussians up to a factor."""
    return (velocity - base_velocity).square().flatten(1).mean(dim=1)


def adaptive_error(prediction: Tensor, x0: Tensor) -> Tensor:
    """(N,) mean over elements of (prediction - x0)^2, divided by the mean of |prediction - x0| as a constant.

    The adaptive weight of DiffusionNFT's published code; at least 1e-5.
    """
    difference = prediction - x0
    weight = difference.detach().abs().flatten(1).mean(dim=1).clamp(min=1e-5)
    return difference.square().flatten(1).mean(dim=1) / weight


def clipped_surrogate(
    likelihood: Tensor, old: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """PPO's loss of each sample, and where it is cut.

    Args:
        likelihood: (N,) log-likelihoods under the policy, with gradient.
        old: (N,) under the policy that sampled.
        advantages: (N,).

    Returns:
        (N,) max(-A ratio, -A clamp(ratio, 1 - c, 1 + c)), and (N,) bool: the clamp holds it, no gradient.
    """
    ratio = torch.exp(likelihood - old)
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(free, held), (held > free).detach()
