"""Flow-GRPO's stochastic sampler (arXiv 2505.05470, section 4.2): the Gaussians its steps draw from.

The ODE dx = v dt of a flow-matching model has the same marginals as an SDE with any noise; Flow-GRPO takes
noise_level * sqrt(sigma / (1 - sigma)). Rollout workers draw from these Gaussians and the learner evaluates
their likelihoods: both call this, so both mean the same.
"""

from __future__ import annotations

import math

from torch import Tensor

from policy.schedule import Schedule

DEFAULT_NOISE_LEVEL = 0.7
"""The paper's."""

FIRST_SIGMA_ROUNDING = 1e-3
"""How far from 1 a schedule's first sigma may be and still be meant as 1."""


def step_gaussian(
    schedule: Schedule, index: int, x: Tensor, velocity: Tensor, noise_level: float
) -> tuple[Tensor, Tensor]:
    """What the next point of a trajectory is drawn from.

    Args:
        schedule: of Euler steps.
        index: of the step; not the last one, which ends at sigma 0 and has no likelihood.
        x: (N, C, h, w) the points at sigma(index).
        velocity: (N, C, h, w) the model's, there.

    Returns:
        (N, C, h, w) mean, and () standard deviation of every element.
    """
    # Numbers of their own, and not tensors: exact to a double, whatever the dtype of x.
    sigma, after = float(schedule.sigmas[index]), float(schedule.following[index])
    noise, passed = _noise(sigma, after, index, noise_level), sigma - after
    pull = noise**2 / (2 * sigma)
    mean = x * (1 - pull * passed) - velocity * ((1 + pull * (1 - sigma)) * passed)
    return mean, x.new_tensor(noise * math.sqrt(passed))


def log_likelihood(value: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """(N,) mean over elements of log N(value; mean, deviation^2): the mean, as published, and not the sum."""
    scaled = (value - mean) / deviation
    return (-0.5 * scaled.square() - deviation.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(dim=1)


def gaussian_kl(mean: Tensor, other: Tensor, deviation: Tensor) -> Tensor:
    """(N,) mean over elements of the KL of two Gaussians with the same deviation."""
    return ((mean - other) / deviation).square().flatten(1).mean(dim=1) / 2


def _noise(sigma: float, after: float, index: int, noise_level: float) -> float:
    # At sigma 1 the noise would be infinite: it is taken where the next step is, as published. Some shifts
    # leave the first sigma a rounding error beside 1, where it would be huge or not a number.
    below = after if index == 0 and sigma > 1 - FIRST_SIGMA_ROUNDING else sigma
    return noise_level * math.sqrt(sigma / (1 - below))
