"""The velocity probe: do two processes with the same weights compute the same velocity?

A fixed input, the same in every process, goes through the model once; what comes out is kept as a sketch of
at most 256 numbers, which travels with the announcement of the weights. Sketches are linear and keep lengths:
the distance between two of them is that between the velocities to about 5 % (one standard deviation) at any
latent size, and exactly where the velocity has no more elements than the sketch.

It sees everything between weights and velocity: frozen weights, adapters and their scale, dtype, guidance
that is embedded, the denoiser's code and its kernels. It does not see text encoders, VAE and solver.

Promises
- Input and sketch follow from the latents' shape and the condition's widths alone; no global random number is
  drawn, and no weight, gradient or cache changes.
- One process, or two on machines of one type with equal thread counts, give the same sketch to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from policy.base import Policy

SEED = 20251008
TIMESTEP = 500.0
"""Noise level 0.5: every family has it, SDXL too, and bfloat16, in which some transformers are told it, has
it exactly."""
SIZE = 256
"""Numbers of a sketch at most."""
UNLIKE = 2.0
"""The largest `probe_error`: nothing in common, or not comparable."""
TOLERANCE = {torch.float32: 0.003, torch.bfloat16: 0.05}
"""Relative error between healthy processes at most, by the dtype of the frozen weights. Machines of one type
agree to the bit; docs/architecture.md says what others may differ by, as far as it could be measured."""


class VelocityDrift(RuntimeError):
    """With the same weights this process computes another velocity than the one that published them."""


def probe(policy: Policy, tensors: Mapping[str, Tensor] | None = None) -> tuple[float, ...]:
    """The sketch of the velocity at the probe's input. One forward pass of one sample.

    Args:
        tensors: trained tensors to compute it with; None: those the policy has.
    """
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn((1, *policy.latent_shape()), generator=generator)
    condition = policy.random_condition(generator)
    with torch.no_grad(), policy.swapped(tensors) if tensors is not None else nullcontext():
        velocity = policy.velocity(x.to(policy.device), torch.tensor(TIMESTEP), condition)
    return sketch(velocity)


def sketch(velocity: Tensor) -> tuple[float, ...]:
    """At most 256 numbers of a tensor: its elements with random signs, added up in random bins."""
    elements = velocity.detach().flatten().to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(SEED + 1)
    place = torch.randperm(len(elements), generator=generator)
    sign = torch.randint(0, 2, (len(elements),), generator=generator, dtype=torch.float64) * 2 - 1
    bins = min(SIZE, len(elements))
    summed = torch.zeros(bins, dtype=torch.float64).index_add_(0, place % bins, elements * sign)
    return tuple(summed.tolist())


def probe_error(expected: Sequence[float], found: Sequence[float]) -> float:
    """Distance of two sketches over the longer of them: 0 where they are the same, at most 2.

    >>> probe_error((3.0, 4.0), (3.0, 4.0)), round(probe_error((3.0, 4.0), (3.0, 4.05)), 4)
    (0.0, 0.0099)
    """
    if len(expected) != len(found) or not all(map(math.isfinite, (*expected, *found))):
        return UNLIKE
    longer = max(math.hypot(*expected), math.hypot(*found))
    return math.dist(expected, found) / longer if longer else 0.0


def check_probe(
    policy: Policy, expected: Sequence[float], *, tolerance: float | None, weights: str, here: str
) -> float:
    """Compare the velocity of a policy with the one that was published.

    Args:
        expected: the published sketch.
        tolerance: `rollout.probe_tolerance`; None: that of the model's dtype.
        weights: what is installed, for the error.
        here: who compares, for the error.

    Returns:
        The relative error.

    Raises:
        VelocityDrift: it exceeds the tolerance.
    """
    if tolerance is None:
        tolerance = TOLERANCE[getattr(torch, policy.config.dtype)]
    found = probe(policy)
    error = probe_error(expected, found)
    if error > tolerance:
        raise VelocityDrift(
            f"{weights}: the velocity on {here} differs from the learner's by {error:.2g} of its length, and "
            f"at most {tolerance:g} is expected (rollout.probe_tolerance). The published tensors arrived "
            "whole, so something else differs: compare the files under model.path on that node with those of "
            "the learner's node, the versions of torch, diffusers and peft, and the kinds of device"
        )
    return error
