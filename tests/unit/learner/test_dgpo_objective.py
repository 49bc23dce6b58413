"""The objective's gradient is that of the written formula, for every switch and every micro-batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from toy_policy import SHAPE, ToyPolicy, live_groups, toy_config

from learner.objectives.base import LiveGroup, Measurements, make_objective, objectives
from learner.objectives.formulas import clipped, group_losses, group_scores, group_weights
from learner.objectives.forward_process import noised
from policy.schedule import make_schedule
from services.config import OBJECTIVES, Config
from services.seeds import derive_seed

TIMESTEPS = (2, 0)
STEP = 7
EVERY_SWITCH = [
    {},
    {"clip_range": 0.2},
    {"kl": 0.3},
    {"clip_range": 0.2, "kl": 0.3, "shared_noise": False},
    {"reference": "frozen"},
    {"reference": "frozen", "clip_range": 0.2, "kl": 0.3},
    {"reference": "frozen", "kl_cfg": 3.0, "kl": 0.3},
    {"shared_noise": False},
]


def written_loss(
    policy: ToyPolicy, config: Config, groups: list[LiveGroup], old: dict[str, Tensor]
) -> tuple[Tensor, int]:
    """DESIGN section 5, one sample at a time; and how many samples are clipped."""
    objective, schedule, network = config.objective, make_schedule(config.rollout), policy.transformer
    base = policy._base
    negative = policy.negative()["text"].double()
    assert base is not None

    def velocity(weights: dict[str, Tensor], x: Tensor, index: int, text: Tensor) -> Tensor:
        out: Tensor = functional_call(network, weights, (x[None], schedule.timesteps[index], text[None]))
        return out[0]

    losses, cut = [], 0
    for group in groups:
        for index in TIMESTEPS:
            seed = derive_seed("noise", config.run.seed, STEP, group.ordinal, index)
            size = len(group.latents)
            shape = (1 if objective.shared_noise else size, *SHAPE)
            noise = (
                torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                .double()
                .expand(size, *SHAPE)
            )
            sigma, text = schedule.sigmas[index].double(), group.condition["text"].double()
            score, kl = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            for x0, eps, advantage in zip(group.latents, noise, group.advantages, strict=True):
                x = (1 - sigma) * x0 + sigma * eps
                v = velocity(dict(network.named_parameters()), x, index, text)
                v_old = velocity(old, x, index, text)
                toward, away = velocity(base, x, index, text), velocity(base, x, index, negative)
                v_base = away + objective.kl_cfg * (toward - away)
                d, d_old, d_base = (((eps - x0 - one) ** 2).mean() for one in (v, v_old, v_base))
                if objective.clip_range is not None:
                    rho, c = math.exp((d_old - d).item()), objective.clip_range
                    if (advantage > 0 and rho > 1 + c) or (advantage < 0 and rho < 1 - c):
                        d, cut = d.detach(), cut + 1
                reference = d_base if objective.reference == "frozen" else d_old
                score = score + advantage * (d - reference.detach()) / size
                kl = kl + ((v - v_base.detach()) ** 2).mean() / size
            losses.append(torch.log1p(torch.exp(objective.beta * score)) / objective.beta + objective.kl * kl)
    return torch.stack(losses).mean(), cut


def accumulated(
    config: Config, policy: ToyPolicy, groups: list[LiveGroup], reference: dict[str, Tensor] | None
) -> tuple[list[Tensor], Measurements]:
    for parameter in policy.trainable().values():
        parameter.grad = None
    measured = make_objective(policy, config, make_schedule(config.rollout)).accumulate(
        groups, TIMESTEPS, step=STEP, scale=1 / (len(groups) * len(TIMESTEPS)), reference=reference
    )
    return [p.grad.clone() for p in policy.trainable().values() if p.grad is not None], measured


def moved_policy(dtype: torch.dtype = torch.float64) -> tuple[ToyPolicy, dict[str, Tensor]]:
    """A policy away from its base, and a reference away from both."""
    policy = ToyPolicy(dtype)
    policy.install(policy.moved(0.2, seed=1))
    return policy, policy.moved(0.1, seed=2)


@pytest.mark.parametrize("switches", EVERY_SWITCH, ids=str)
@pytest.mark.parametrize(
    ("micro_batch", "offload"), [(1, False), (2, False), (4, False), (8, False), (2, True)]
)
def test_gradient_is_that_of_the_formula(micro_batch: int, offload: bool, switches: dict[str, Any]) -> None:
    config = toy_config(
        objective={"beta": 5.0, "clip_range": None, "timesteps": {"first": 3, "per_update": 2}, **switches},
        learner={"micro_batch": micro_batch, "activation_offload": offload},
    )
    policy, old = moved_policy()
    groups = live_groups(3)
    loss, cut = written_loss(policy, config, groups, old)
    expected = torch.autograd.grad(loss, list(policy.trainable().values()))
    samples = 3 * 4 * len(TIMESTEPS)
    if config.objective.clip_range is not None:
        assert 0 < cut < samples
    gradients, measured = accumulated(config, policy, groups, old)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert measured.mean("loss") == pytest.approx(loss.item(), rel=1e-9)
    assert measured.mean("clip_fraction") == pytest.approx(cut / samples)
    assert measured.pairs == 6


@pytest.mark.parametrize("switches", [{}, {"clip_range": 0.2}, {"kl": 0.3}], ids=str)
def test_deferred_weight_equals_whole_groups_in_float32(switches: dict[str, Any]) -> None:
    policy, old = moved_policy(torch.float32)
    groups = live_groups(3, dtype=torch.float32)
    results = []
    for micro_batch in (1, 2, 4, 8):
        objective = {"beta": 50.0, "clip_range": None, **switches, "timesteps": {"first": 3, "per_update": 2}}
        config = toy_config(objective=objective, learner={"micro_batch": micro_batch})
        results.append(accumulated(config, policy, groups, old)[0])
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_deferred_gradient_is_added_to_what_is_there() -> None:
    policy, old = moved_policy()
    groups, config = live_groups(2), toy_config(learner={"micro_batch": 2})
    alone, _ = accumulated(config, policy, groups, old)
    for parameter in policy.trainable().values():
        parameter.grad = torch.ones_like(parameter)
    objective = make_objective(policy, config, make_schedule(config.rollout))
    objective.accumulate(groups, TIMESTEPS, step=STEP, scale=1 / 4, reference=old)
    for parameter, gradient in zip(policy.trainable().values(), alone, strict=True):
        torch.testing.assert_close(parameter.grad, gradient + 1)


@pytest.mark.parametrize("micro_batch", [1, 4, 8])
@pytest.mark.parametrize("switches", [{}, {"clip_range": 1e-3}, {"kl": 0.3}], ids=str)
def test_a_reference_that_is_the_policy_is_not_computed_again(
    switches: dict[str, Any], micro_batch: int
) -> None:
    objective = {"beta": 50.0, "clip_range": None, **switches, "timesteps": {"first": 3, "per_update": 2}}
    config = toy_config(objective=objective, learner={"micro_batch": micro_batch})
    policy, _ = moved_policy(torch.float32)
    groups = live_groups(2, dtype=torch.float32)
    policy.forwards = 0
    explicit, measured = accumulated(config, policy, groups, policy.tensors())
    with_reference, policy.forwards = policy.forwards, 0
    implicit, again = accumulated(config, policy, groups, None)
    samples = 2 * 4 * len(TIMESTEPS)
    assert policy.forwards == samples * (2 if config.objective.kl else 1)
    assert with_reference >= policy.forwards + samples
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(implicit, explicit, strict=True))
    assert {n: again.mean(n) for n in again.sums} == {n: measured.mean(n) for n in measured.sums}
    assert again.mean("weight") == 0.5


@pytest.mark.parametrize(
    ("switches", "learner", "forwards"),
    [
        ({}, {"micro_batch": 8}, 2),
        ({}, {"micro_batch": 1}, 2),
        ({"clip_range": 0.1}, {"micro_batch": 8}, 2),
        ({"reference": "frozen"}, {"micro_batch": 8}, 2),
        ({"reference": "frozen", "kl": 0.1}, {"micro_batch": 8}, 2),
        ({"reference": "frozen", "clip_range": 0.1}, {"micro_batch": 8}, 3),
        ({"kl": 0.1}, {"micro_batch": 8}, 3),
        ({"kl": 0.1}, {"micro_batch": 2}, 4),
        ({"kl": 0.1}, {"micro_batch": 2, "activation_offload": True}, 3),
    ],
)
def test_no_forward_is_wasted(switches: dict[str, Any], learner: dict[str, Any], forwards: int) -> None:
    objective = {"clip_range": None, **switches, "timesteps": {"first": 3, "per_update": 2}}
    config = toy_config(objective=objective, learner=learner)
    policy, old = moved_policy()
    policy.forwards = 0
    accumulated(config, policy, live_groups(2), old)
    assert policy.forwards == forwards * 2 * 4 * len(TIMESTEPS)


def test_permuting_a_group_changes_nothing() -> None:
    policy, old = moved_policy()
    config, groups, order = toy_config(), live_groups(2), [2, 0, 3, 1]
    permuted = [LiveGroup(g.ordinal, g.latents[order], g.advantages[order], g.condition) for g in groups]
    for ours, theirs in zip(
        accumulated(config, policy, permuted, old)[0],
        accumulated(config, policy, groups, old)[0],
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_noise_depends_on_seed_step_ordinal_and_timestep_alone() -> None:
    group, other = live_groups(2)
    schedule = make_schedule(toy_config().rollout)

    def noise(of: LiveGroup, index: int, step: int, seed: int = 0) -> Tensor:
        batch = noised([of], schedule, index, seed=seed, step=step, shared=True)
        return batch.target + batch.x0

    drawn = noise(group, 1, 5)
    assert torch.equal(drawn, noise(group, 1, 5))
    torch.testing.assert_close(drawn[0], drawn[3])
    for different in (noise(group, 1, 6), noise(group, 2, 5), noise(other, 1, 5), noise(group, 1, 5, seed=1)):
        assert not torch.allclose(drawn, different)


@pytest.mark.parametrize(
    ("advantage", "ratio", "cut"),
    [
        (1.0, 1.0 + 0.1 + 1e-9, True),
        (1.0, 1.0 + 0.1 - 1e-9, False),
        (1.0, 0.5, False),
        (-1.0, 1.0 - 0.1 - 1e-9, True),
        (-1.0, 1.0 - 0.1 + 1e-9, False),
        (-1.0, 2.0, False),
        (0.0, 3.0, False),
        (0.0, 0.1, False),
    ],
)
def test_clip_borders(advantage: float, ratio: float, cut: bool) -> None:
    dsm = torch.tensor([0.7], dtype=torch.float64)
    old = dsm + math.log(ratio)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    assert bool(clipped(dsm, old, advantages, 0.1)) is cut
    assert not bool(clipped(dsm, old, advantages, None))


def test_weight_is_the_derivative_of_the_loss() -> None:
    scores = torch.tensor([-0.3, 0.0, 0.2], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(group_losses(scores, 7.0).sum(), scores)
    torch.testing.assert_close(slope, group_weights(scores.detach(), 7.0))
    torch.testing.assert_close(
        group_losses(scores.detach(), 7.0), -torch.log(torch.sigmoid(-7.0 * scores.detach())) / 7.0
    )


def test_a_preference_that_is_fitted_better_than_the_reference_has_a_negative_score() -> None:
    advantages = torch.tensor([[1.0, -1.0]])
    reference = torch.tensor([[0.5, 0.5]])
    assert float(group_scores(torch.tensor([[0.4, 0.6]]), reference, advantages)) < 0
    assert float(group_scores(torch.tensor([[0.6, 0.4]]), reference, advantages)) > 0


def test_the_configuration_names_the_objectives_that_are_there() -> None:
    assert set(OBJECTIVES) == set(objectives())
