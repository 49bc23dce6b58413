"""Flow-GRPO's sampler: a sample follows from its seed, and its likelihoods are those of the steps it took."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from policy import Policy, load_policy
from policy.schedule import make_schedule
from policy.sde import log_likelihood, step_gaussian
from rollout_workers.policy_sampler import PolicySampler
from rollout_workers.sampling import sample, sample_trajectory
from rollout_workers.solvers import solve_stochastic
from services.config import ModelConfig, RolloutConfig
from services.config_file import load_config
from services.messages import PolicyVersion
from services.prompts import group_task, prompt_source
from services.transports.shared_directory import SharedDirectoryTransport

PROMPT = 'a sign that says "K7QX"'
STEPS = 5
LATENT = (4, 8, 16)


@pytest.fixture(scope="module")
def policies() -> dict[str, Policy]:
    return {}


@pytest.fixture
def policy(model_config: ModelConfig, policies: dict[str, Policy]) -> Policy:
    if "policy" not in policies:
        policies["policy"] = load_policy(model_config, text_encoders=True, vae=True)
    return policies["policy"]


def rollout(**settings: float) -> RolloutConfig:
    return RolloutConfig.model_validate({"solver": "sde", "steps": STEPS, "group_size": 3, **settings})


def velocity(x: Tensor, timestep: Tensor) -> Tensor:
    return torch.sin(2 * x) + timestep / 1000


def start(count: int) -> Tensor:
    return torch.randn(count, 2, 3, 4, generator=torch.Generator().manual_seed(0))


def test_a_trajectory_is_made_of_the_steps_it_says() -> None:
    x = start(3)
    final, trajectory = solve_stochastic(rollout(), velocity, x, [7, 8, 9])
    assert final.shape == x.shape
    assert trajectory.points.shape == (3, STEPS, 2, 3, 4)
    assert trajectory.log_likelihoods.shape == (3, STEPS - 1)
    assert {final.dtype, trajectory.points.dtype, trajectory.log_likelihoods.dtype} == {torch.float32}
    assert torch.equal(trajectory.points[:, 0], x)
    schedule = make_schedule(rollout())
    for index in range(STEPS - 1):
        before, after = trajectory.points[:, index], trajectory.points[:, index + 1]
        mean, deviation = step_gaussian(
            schedule, index, before, velocity(before, schedule.timesteps[index]), 0.7
        )
        expected = Normal(mean, deviation).log_prob(after).flatten(1).mean(dim=1)
        torch.testing.assert_close(trajectory.log_likelihoods[:, index], expected, rtol=0, atol=1e-6)
    last = trajectory.points[:, -1]
    ode = last - schedule.sigmas[-1] * velocity(last, schedule.timesteps[-1])
    torch.testing.assert_close(final, ode, rtol=0, atol=1e-6)


def test_a_sample_follows_from_its_seed_alone() -> None:
    x, seeds = start(3), [7, 8, 9]
    final, trajectory = solve_stochastic(rollout(), velocity, x, seeds)
    again, repeated = solve_stochastic(rollout(), velocity, x, seeds)
    assert torch.equal(final, again)
    assert torch.equal(trajectory.points, repeated.points)
    assert torch.equal(trajectory.log_likelihoods, repeated.log_likelihoods)
    for place in (2, 0):
        alone, part = solve_stochastic(rollout(), velocity, x[[place]], [seeds[place]])
        torch.testing.assert_close(alone[0], final[place])
        torch.testing.assert_close(part.points[0], trajectory.points[place])
        torch.testing.assert_close(part.log_likelihoods[0], trajectory.log_likelihoods[place])
    other, _ = solve_stochastic(rollout(), velocity, x, [7, 8, 10])
    assert torch.equal(other[:2], final[:2])
    assert not torch.allclose(other[2], final[2], atol=0.1)


def test_no_noise_is_used_twice() -> None:
    """Between the samples, between the steps, and with the initial latents of the same seed."""
    seeds = [3, 4]
    initial = torch.stack([torch.randn(2, 30, 40, generator=torch.Generator().manual_seed(s)) for s in seeds])
    _, trajectory = solve_stochastic(rollout(), lambda x, timestep: torch.zeros_like(x), initial, seeds)
    schedule = make_schedule(rollout())
    drawn = [initial]
    for index in range(STEPS - 1):
        x = trajectory.points[:, index]
        mean, deviation = step_gaussian(schedule, index, x, torch.zeros_like(x), 0.7)
        drawn.append((trajectory.points[:, index + 1] - mean) / deviation)
    flat = torch.cat(drawn).flatten(1)
    assert bool((flat.mean(dim=1).abs() < 0.1).all())
    assert bool((flat.var(dim=1) - 1).abs().max() < 0.15)
    apart = torch.corrcoef(flat) - torch.eye(len(flat))
    assert float(apart.abs().max()) < 0.1


def test_more_noise_spreads_the_steps_more() -> None:
    def jump(**settings: float) -> float:
        _, trajectory = solve_stochastic(rollout(**settings), velocity, start(1), [1])
        return float((trajectory.points[0, 1] - trajectory.points[0, 0]).std())

    assert jump(noise_level=1e-4) < jump(noise_level=0.3) < jump() == jump(noise_level=0.7)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_learner_s_likelihood_of_a_step_is_the_stored_one(policy: Policy, guidance: float) -> None:
    settings = rollout(guidance=guidance)
    condition, negative = policy.encode(PROMPT), policy.negative()
    latents, trajectory = sample_trajectory(policy, condition, negative, (1, 2, 3), settings)
    assert trajectory is not None
    assert not trajectory.points.is_inference()
    assert not trajectory.log_likelihoods.is_inference()
    assert torch.equal(trajectory.points[:, 0], policy.initial_latents((1, 2, 3)))
    assert torch.equal(sample(policy, condition, negative, (1, 2, 3), settings), latents)
    schedule = make_schedule(settings)
    for index in range(STEPS - 1):
        x, after = trajectory.points[:, index], trajectory.points[:, index + 1]
        speed = policy.velocity(
            x, schedule.timesteps[index], [condition], guidance=guidance, negative=negative
        )
        ours = log_likelihood(after, *step_gaussian(schedule, index, x, speed, 0.7))
        torch.testing.assert_close(ours.detach(), trajectory.log_likelihoods[:, index], rtol=0, atol=1e-6)
        assert ours.requires_grad


def test_an_ode_solver_has_no_trajectory(policy: Policy) -> None:
    settings = RolloutConfig(solver="euler", steps=2, group_size=2)
    latents, trajectory = sample_trajectory(policy, policy.encode(PROMPT), None, (1, 2), settings)
    assert latents.shape == (2, *LATENT)
    assert trajectory is None


SMALL = ["rollout.group_size=2", "rollout.steps=4", "learner.micro_batch=2"]
DRAWN = "timesteps: {first: 3, per_update: 2}"


@pytest.mark.parametrize(
    ("overrides", "carried"),
    [
        (["rollout.solver=sde", f"objective={{name: flow_grpo, {DRAWN}}}"], True),
        (["rollout.solver=sde", f"objective={{name: diffusion_nft, {DRAWN}}}"], False),
        (["rollout.solver=sde", f"objective={{name: dgpo, {DRAWN}}}"], False),
        (["rollout.solver=heun", f"objective={{name: dgpo, {DRAWN}}}"], False),
    ],
)
def test_a_payload_holds_the_trajectory_where_the_objective_needs_it(
    tmp_path: Path, overrides: list[str], carried: bool
) -> None:
    config = load_config("quickstart", [*SMALL, *overrides])
    sampler = PolicySampler(config, tmp_path, SharedDirectoryTransport(tmp_path))
    task = group_task(config, prompt_source(config), "run", 5, 1, PolicyVersion(epoch=0, step=0))
    group = sampler.sample(task)
    shape = group.tensors["latents"].shape
    assert shape == (2, *sampler.policy.latent_shape())
    assert len(group.images) == 2
    names = {name for name in group.tensors if not name.startswith("condition.")}
    if not carried:
        assert names == {"latents"}
        return
    assert names == {"latents", "trajectory", "log_likelihoods"}
    points, likelihoods = group.tensors["trajectory"], group.tensors["log_likelihoods"]
    assert (points.shape, likelihoods.shape) == ((2, 4, *shape[1:]), (2, 3))
    assert all(tensor.is_contiguous() for tensor in group.tensors.values())
    assert torch.equal(points[:, 0], sampler.policy.initial_latents(task.seeds))
    assert bool(torch.isfinite(likelihoods).all())
