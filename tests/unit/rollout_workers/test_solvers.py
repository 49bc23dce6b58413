"""Our solvers take the steps of the stock pipeline; training sees the same schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from policy import Policy, load_policy
from policy.loading import align
from policy.schedule import make_schedule, make_scheduler
from rollout_workers.sampling import sample
from rollout_workers.solvers import solve
from services.config import ModelConfig, RolloutConfig

PROMPT = 'a sign that says "K7QX"'
ODE_SOLVERS: list[dict[str, Any]] = [
    {"solver": "dpmsolver++"},
    {"solver": "dpmsolver++", "order": 1},
    {"solver": "dpmsolver++", "order": 3},
    {"solver": "euler"},
    {"solver": "heun"},
]


@pytest.fixture(scope="module")
def policies() -> dict[str, Policy]:
    return {}


@pytest.fixture
def policy(model_config: ModelConfig, policies: dict[str, Policy]) -> Policy:
    if "policy" not in policies:
        policies["policy"] = load_policy(model_config, text_encoders=True, vae=True)
    return policies["policy"]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("solver", ODE_SOLVERS, ids=str)
def test_sampling_equals_the_stock_pipeline(
    policy: Policy, model_config: ModelConfig, solver: dict[str, Any], guidance: float
) -> None:
    rollout = RolloutConfig(**solver, steps=6, guidance=guidance, shift=3.0, group_size=3)
    seeds = (11, 12, 13)
    pipeline = StableDiffusion3Pipeline.from_pretrained(model_config.path)
    pipeline.scheduler = make_scheduler(rollout)
    pipeline.set_progress_bar_config(disable=True)
    align(pipeline)

    def stock(output_type: str) -> object:
        return pipeline(
            PROMPT,
            height=32,
            width=64,
            num_inference_steps=rollout.steps,
            guidance_scale=guidance,
            max_sequence_length=1,
            num_images_per_prompt=3,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type=output_type,
        ).images

    latents = sample(policy, policy.encode(PROMPT), policy.negative(), seeds, rollout)
    assert torch.equal(latents, stock("latent"))
    expected = np.stack([np.asarray(image) for image in stock("pil")])
    assert np.array_equal(policy.decode(latents, batch=3), expected)


def test_samples_may_be_trained_on(policy: Policy) -> None:
    latents = sample(policy, policy.encode(PROMPT), None, (1, 2), RolloutConfig(steps=2, group_size=2))
    assert not latents.is_inference()
    assert not latents.requires_grad
    policy.velocity(latents, torch.tensor(500.0), policy.encode(PROMPT)).sum().backward()


def test_several_conditions_in_one_batch(policy: Policy) -> None:
    rollout = RolloutConfig(steps=3, group_size=2)
    one, other = policy.encode(PROMPT), policy.encode('a sign that says "ZZ9"')
    together = sample(policy, [one, other], None, (1, 2), rollout)
    apart = torch.cat([sample(policy, one, None, (1,), rollout), sample(policy, other, None, (2,), rollout)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ODE_SOLVERS, ids=str)
def test_the_schedule_is_what_the_solver_visits(solver: dict[str, Any]) -> None:
    rollout = RolloutConfig(**solver, steps=7, shift=2.5)
    visited: list[float] = []

    def velocity(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        visited.append(float(timestep))
        return torch.zeros_like(x)

    solve(rollout, velocity, torch.zeros(1, 1, 2, 2))
    schedule = make_schedule(rollout)
    assert list(dict.fromkeys(visited)) == schedule.timesteps.tolist()
    # Heun's corrector evaluates the end of each step but the last, where the next begins.
    assert [visited.count(point) for point in dict.fromkeys(visited)] == (
        [1, *[2] * 6] if rollout.solver == "heun" else [1] * 7
    )
    assert len(schedule) == 7
    sigmas = schedule.sigmas
    assert bool(((sigmas > 0) & (sigmas <= 1)).all())
    assert bool((sigmas.diff() < 0).all())
    # diffusers rounds the timesteps of DPM-Solver++ down to whole numbers.
    assert bool(((sigmas * 1000 - schedule.timesteps).abs() < 1).all())


@pytest.mark.parametrize("solver", ODE_SOLVERS, ids=str)
def test_a_straight_flow_is_solved_exactly(solver: dict[str, Any]) -> None:
    x0, noise = torch.full((1, 1, 2, 2), 0.25), torch.full((1, 1, 2, 2), -1.5)
    rollout = RolloutConfig(**solver, steps=5)
    sigma = float(make_schedule(rollout).sigmas[0])
    start = (1 - sigma) * x0 + sigma * noise
    end = solve(rollout, lambda x, timestep: noise - x0, start)
    torch.testing.assert_close(end, x0, rtol=0, atol=1e-5)


def test_orders_are_different_solvers() -> None:
    """On a curved flow each order ends elsewhere, and null is the second."""

    def end(solver: dict[str, Any]) -> float:
        rollout = RolloutConfig(**solver, steps=6)
        return float(solve(rollout, lambda x, timestep: torch.sin(3 * x) + x, torch.full((1, 1, 1, 1), 0.9)))

    ends = [end(solver) for solver in ODE_SOLVERS]
    assert end({"solver": "dpmsolver++", "order": 2}) == ends[0]
    assert all(abs(one - other) > 1e-4 for i, one in enumerate(ends) for other in ends[:i])
