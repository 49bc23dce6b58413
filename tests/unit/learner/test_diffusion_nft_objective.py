"""DiffusionNFT's gradient is that of the written formula, for every switch and every micro-batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from toy_policy import SHAPE, ToyPolicy, live_groups
from toy_trajectories import objective_config

from learner.objectives.base import LiveGroup, Measurements, make_objective
from learner.objectives.formulas import adaptive_error
from policy.schedule import make_schedule
from services.config import Config, DiffusionNftConfig
from services.seeds import derive_seed

TIMESTEPS = (2, 0)
STEP = 7
EVERY_SWITCH: list[dict[str, Any]] = [
    {},
    {"kl": 0.3},
    {"shared_noise": True},
    {"beta": 0.3, "kl": 0.3, "shared_noise": True},
    {"beta": 2.5},
]


def config_with(micro_batch: int = 8, *, clip: float = 0.8, **objective: Any) -> Config:
    """A_max 0.8, so that some advantages are beyond it."""
    return objective_config(
        {"name": "diffusion_nft", **objective},
        advantage={"clip": clip},
        learner={"micro_batch": micro_batch},
    )


def moved_policy(dtype: torch.dtype = torch.float64) -> tuple[ToyPolicy, dict[str, Tensor]]:
    """A policy away from its base, and a reference away from both."""
    policy = ToyPolicy(dtype)
    policy.install(policy.moved(0.2, seed=1))
    return policy, policy.moved(0.1, seed=2)


def written_loss(
    policy: ToyPolicy,
    config: Config,
    groups: list[LiveGroup],
    old: dict[str, Tensor] | None,
    at: dict[str, Tensor] | None = None,
) -> Tensor:
    """The paper's loss with the published code's adaptive weight, one sample at a time.

    With weights `at`, but what is a constant (the adaptive weight, v_old) stays that of the policy as it is.
    """
    objective, schedule, base = config.objective, make_schedule(config.rollout), policy._base
    assert isinstance(objective, DiffusionNftConfig) and base is not None
    beta, largest, now = objective.beta, config.advantage.clip, policy.trainable()

    def regression(v: Tensor, here: Tensor, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        weight = max(1e-5, float((x - sigma * here - x0).abs().mean()))
        return ((x - sigma * v - x0) ** 2 / weight).mean()

    losses = []
    for group in groups:
        for index in TIMESTEPS:
            source = torch.Generator().manual_seed(
                derive_seed("noise", config.run.seed, STEP, group.ordinal, index)
            )
            size = 1 if objective.shared_noise else len(group.latents)
            noises = torch.randn((size, *SHAPE), generator=source).double().expand(group.latents.shape)
            sigma, text = schedule.sigmas[index].double(), group.condition["text"].double()
            for x0, noise, advantage in zip(group.latents, noises, group.advantages, strict=True):
                x = (1 - sigma) * x0 + sigma * noise
                given = (x[None], schedule.timesteps[index], text[None])

                def out(weights: dict[str, Tensor], given: Any = given) -> Tensor:
                    result: Tensor = functional_call(policy.transformer, weights, given)
                    return result[0]

                v, v_base, here = out(at or dict(now)), out(base), out(dict(now)).detach()
                v_old = here if old is None else out(old)
                r = min(1.0, max(0.0, float(advantage) / (2 * largest) + 0.5))
                mixed = [(1 - beta) * v_old + beta * one for one in (v, here)]
                positive = regression(*mixed, x, x0, sigma)
                mixed = [(1 + beta) * v_old - beta * one for one in (v, here)]
                negative = regression(*mixed, x, x0, sigma)
                loss = largest / beta * (r * positive + (1 - r) * negative)
                losses.append(loss + objective.kl * ((v - v_base) ** 2).mean())
    return torch.stack(losses).mean()


def accumulated(
    config: Config, policy: ToyPolicy, groups: list[LiveGroup], reference: dict[str, Tensor] | None
) -> tuple[list[Tensor], Measurements]:
    for parameter in policy.trainable().values():
        parameter.grad = None
    measured = make_objective(policy, config, make_schedule(config.rollout)).accumulate(
        groups, TIMESTEPS, step=STEP, scale=1 / (len(groups) * len(TIMESTEPS)), reference=reference
    )
    return [p.grad.clone() for p in policy.trainable().values() if p.grad is not None], measured


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("switches", EVERY_SWITCH, ids=str)
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8, 12])
@pytest.mark.parametrize("other", [True, False], ids=["reference", "on-policy"])
def test_gradient_is_that_of_the_formula(micro_batch: int, switches: dict[str, Any], other: bool) -> None:
    config = config_with(micro_batch, **switches)
    policy, old = moved_policy()
    groups = live_groups(3)
    reference = old if other else None
    loss = written_loss(policy, config, groups, reference)
    gradients, measured = accumulated(config, policy, groups, reference)
    assert_same(gradients, list(torch.autograd.grad(loss, list(policy.trainable().values()))))
    assert measured.pairs == 3 * len(TIMESTEPS)
    assert measured.mean("loss") == pytest.approx(loss.item(), rel=1e-9)
    assert (measured.mean("kl") is None) == (config.objective.kl == 0)


@pytest.mark.parametrize("other", [True, False], ids=["reference", "on-policy"])
def test_micro_batches_give_one_gradient_in_float32(other: bool) -> None:
    policy, old = moved_policy(torch.float32)
    groups = live_groups(3, dtype=torch.float32)
    results = [
        accumulated(config_with(size, kl=0.2), policy, groups, old if other else None)[0]
        for size in (1, 2, 4, 8)
    ]
    for gradients in results[1:]:
        for ours, theirs in zip(gradients, results[0], strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def with_advantages(groups: list[LiveGroup], *values: float) -> list[LiveGroup]:
    advantages = torch.tensor(values, dtype=torch.float64)
    return [dataclasses.replace(group, advantages=advantages) for group in groups]


def test_advantages_beyond_the_largest_count_as_the_largest() -> None:
    config = config_with(clip=2.0)
    policy, old = moved_policy()
    groups = live_groups(2)
    at_border, _ = accumulated(config, policy, with_advantages(groups, 2, -2, 2, -2), old)
    beyond, _ = accumulated(config, policy, with_advantages(groups, 9, -9, 2.5, -2.1), old)
    inside, _ = accumulated(config, policy, with_advantages(groups, 2, -2, 2, -1.9), old)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(beyond, at_border, strict=True))
    assert not any(torch.allclose(ours, theirs) for ours, theirs in zip(inside, at_border, strict=True))


def test_at_beta_one_the_best_are_plainly_regressed_to() -> None:
    """r = 1: the old policy drops out, and what is left is flow matching with an adaptive weight."""
    config = config_with(beta=1.0, clip=3.0)
    policy, old = moved_policy()
    groups = with_advantages(live_groups(2), 3, 3, 3, 3)
    gradients, measured = accumulated(config, policy, groups, old)
    assert_same(accumulated(config, policy, groups, policy.moved(0.5, seed=9))[0], gradients)
    total = torch.zeros((), dtype=torch.float64)
    schedule = make_schedule(config.rollout)
    for group in groups:
        for index in TIMESTEPS:
            source = torch.Generator().manual_seed(derive_seed("noise", 0, STEP, group.ordinal, index))
            noise = torch.randn(group.latents.shape, generator=source).double()
            sigma, x0 = schedule.sigmas[index].double(), group.latents
            v = policy.velocity((1 - sigma) * x0 + sigma * noise, schedule.timesteps[index], group.condition)
            # x - sigma v - x0 = sigma (noise - x0 - v)
            miss = sigma * (noise - x0 - v).flatten(1)
            total = total + (miss.square().mean(dim=1) / miss.detach().abs().mean(dim=1)).mean()
    loss = 3.0 * total / (2 * len(TIMESTEPS))
    assert_same(gradients, list(torch.autograd.grad(loss, list(policy.trainable().values()))))
    assert measured.mean("loss") == pytest.approx(loss.item())


def test_without_a_preference_on_policy_nothing_is_pulled() -> None:
    """r = 1/2 and v = v_old: the pull towards a sample and the push away from it cancel."""
    policy, _ = moved_policy()
    gradients, _ = accumulated(config_with(), policy, with_advantages(live_groups(2), 0, 0, 0, 0), None)
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_the_order_of_groups_and_of_samples_changes_nothing(micro_batch: int) -> None:
    config, order = config_with(micro_batch, kl=0.2, shared_noise=True), [2, 0, 3, 1]
    policy, old = moved_policy()
    groups = live_groups(3)
    expected, _ = accumulated(config, policy, groups, old)
    permuted = [
        dataclasses.replace(g, latents=g.latents[order], advantages=g.advantages[order]) for g in groups
    ]
    assert_same(accumulated(config, policy, permuted, old)[0], expected)
    assert_same(accumulated(config, policy, groups[::-1], old)[0], expected)


@pytest.mark.parametrize("other", [True, False], ids=["reference", "on-policy"])
def test_the_gradient_is_the_slope_of_the_loss(other: bool) -> None:
    config = config_with(beta=0.5, kl=0.2)
    policy, old = moved_policy()
    groups, reference = live_groups(2), old if other else None
    gradients, _ = accumulated(config, policy, groups, reference)
    here, width = policy.tensors(), 1e-5
    for seed in range(3):
        direction = {n: t - here[n] for n, t in policy.moved(1.0, seed=seed).items()}
        ahead, behind = (
            written_loss(
                policy, config, groups, reference, {n: here[n] + sign * width * direction[n] for n in here}
            ).item()
            for sign in (1, -1)
        )
        expected = sum(float((g * d).sum()) for g, d in zip(gradients, direction.values(), strict=True))
        assert (ahead - behind) / (2 * width) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("switches", "other", "forwards"),
    [({}, False, 1), ({}, True, 2), ({"kl": 0.1}, False, 2), ({"kl": 0.1}, True, 3)],
)
@pytest.mark.parametrize("micro_batch", [1, 8])
def test_no_forward_is_wasted(switches: dict[str, Any], other: bool, forwards: int, micro_batch: int) -> None:
    config = config_with(micro_batch, **switches)
    policy, old = moved_policy()
    policy.forwards = 0
    accumulated(config, policy, live_groups(2), old if other else None)
    assert policy.forwards == forwards * 2 * 4 * len(TIMESTEPS)


def test_a_reference_that_is_the_policy_makes_no_difference() -> None:
    policy, _ = moved_policy()
    config, groups = config_with(kl=0.2), live_groups(2)
    assert_same(
        accumulated(config, policy, groups, policy.tensors())[0], accumulated(config, policy, groups, None)[0]
    )


def test_the_adaptive_error_has_a_smallest_weight() -> None:
    x0 = torch.zeros(2, *SHAPE, dtype=torch.float64)
    prediction = torch.stack([torch.full(SHAPE, 1e-7), torch.full(SHAPE, -0.5)]).double().requires_grad_()
    error = adaptive_error(prediction, x0)
    torch.testing.assert_close(error.detach(), torch.tensor([1e-14 / 1e-5, 0.5], dtype=torch.float64))
    (slope,) = torch.autograd.grad(error.sum(), prediction)
    # 2 (prediction - x0) / weight / elements: the weight is a constant.
    count = x0[0].numel()
    torch.testing.assert_close(slope[1] * count, torch.full_like(slope[1], -2.0))
    torch.testing.assert_close(slope[0] * count, torch.full_like(slope[0], 2e-7 / 1e-5))
