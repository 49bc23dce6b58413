"""The sketch of a velocity: what its distances say of the velocities themselves."""

from __future__ import annotations

import pytest
import torch

from policy.probe import SIZE, probe_error, sketch


def test_distances_of_sketches_are_those_of_the_velocities() -> None:
    generator = torch.Generator().manual_seed(0)
    velocity, noise = torch.randn((2, 16, 64, 64), generator=generator)
    # Errors of every kind: everywhere, in one place only, and of the mean alone.
    errors = (noise, noise * (torch.arange(64) < 4), torch.ones_like(velocity))
    for error in errors:
        for size in (1e-5, 1e-2):
            other = velocity + size * error
            wanted = float((other - velocity).norm() / other.norm())
            assert probe_error(sketch(velocity), sketch(other)) == pytest.approx(wanted, rel=0.25)
    assert len(sketch(velocity)) == SIZE
    assert probe_error(sketch(velocity), sketch(velocity.clone())) == 0.0


def test_a_small_velocity_is_kept_whole() -> None:
    velocity = torch.arange(1.0, 33.0).reshape(1, 2, 4, 4)
    assert sorted(map(abs, sketch(velocity))) == velocity.flatten().tolist()
