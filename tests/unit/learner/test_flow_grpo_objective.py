"""Flow-GRPO's gradient is that of the written formula, for every switch and every micro-batch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call
from toy_policy import ToyPolicy, live_groups
from toy_trajectories import objective_config, sampled_live_groups

from learner.objectives.base import LiveGroup, Measurements, make_objective
from learner.objectives.flow_grpo import FlowGrpo
from learner.objectives.formulas import clipped_surrogate
from policy.schedule import make_schedule
from services.config import Config, FlowGrpoConfig

TIMESTEPS = (2, 0)
CLIP = 0.01
EVERY_SWITCH: list[dict[str, Any]] = [
    {},
    {"kl": 0.3},
    {"guidance": 2.5},
    {"guidance": 2.5, "kl": 0.3},
    {"noise_level": 1.3, "kl": 0.1},
]


def config_with(micro_batch: int = 8, *, kl: float = 0.0, clip_range: float = CLIP, **rollout: Any) -> Config:
    return objective_config(
        {"name": "flow_grpo", "clip_range": clip_range, "kl": kl},
        rollout=rollout,
        learner={"micro_batch": micro_batch},
    )


def setting(config: Config, dtype: torch.dtype = torch.float64) -> tuple[ToyPolicy, list[LiveGroup]]:
    """A policy away from its base, and groups of a policy that it has moved away from since."""
    policy = ToyPolicy(dtype)
    policy.install(policy.moved(0.2, seed=1))
    groups = sampled_live_groups(3, policy, config, dtype)
    policy.install(policy.moved(0.05, seed=2))
    return policy, groups


def written_loss(policy: ToyPolicy, config: Config, groups: list[LiveGroup]) -> tuple[Tensor, Tensor, int]:
    """The paper's formula, one sample at a time: loss, KL, and how many samples are clipped."""
    objective, schedule, rollout = config.objective, make_schedule(config.rollout), config.rollout
    assert isinstance(objective, FlowGrpoConfig)
    level, c = rollout.noise_level or 0.7, objective.clip_range
    negative, base, now = policy.negative()["text"].double(), policy._base, policy.trainable()
    assert base is not None

    def step(weights: dict[str, Tensor], x: Tensor, index: int, text: Tensor) -> Normal:
        def out(words: Tensor) -> Tensor:
            given = (x[None], schedule.timesteps[index], words[None])
            result: Tensor = functional_call(policy.transformer, weights, given)
            return result[0]

        v = out(negative) + rollout.guidance * (out(text) - out(negative))
        sigma, after = float(schedule.sigmas[index]), float(schedule.sigmas[index + 1])
        dt, std = after - sigma, level * math.sqrt(sigma / (1 - (after if sigma == 1 else sigma)))
        mean = x * (1 + std**2 / (2 * sigma) * dt) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
        return Normal(mean, std * math.sqrt(-dt))

    losses, kls, cut = [], [], 0
    for group in groups:
        assert group.trajectory is not None and group.log_likelihoods is not None
        text = group.condition["text"].double()
        for index in TIMESTEPS:
            for path, old, advantage in zip(
                group.trajectory, group.log_likelihoods, group.advantages, strict=True
            ):
                drawn = step(dict(now), path[index], index, text)
                ratio = torch.exp(drawn.log_prob(path[index + 1]).mean() - old[index])
                cut += bool(advantage > 0 and ratio > 1 + c) or bool(advantage < 0 and ratio < 1 - c)
                kls.append(kl_divergence(drawn, step(base, path[index], index, text)).mean())
                losses.append(
                    -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - c, 1 + c))
                    + objective.kl * kls[-1]
                )
    return torch.stack(losses).mean(), torch.stack(kls).mean(), cut


def accumulated(
    config: Config, policy: ToyPolicy, groups: list[LiveGroup]
) -> tuple[list[Tensor], Measurements]:
    for parameter in policy.trainable().values():
        parameter.grad = None
    measured = make_objective(policy, config, make_schedule(config.rollout)).accumulate(
        groups, TIMESTEPS, step=7, scale=1 / (len(groups) * len(TIMESTEPS)), reference=None
    )
    return [p.grad.clone() for p in policy.trainable().values() if p.grad is not None], measured


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("switches", EVERY_SWITCH, ids=str)
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8, 12])
def test_gradient_is_that_of_the_formula(micro_batch: int, switches: dict[str, Any]) -> None:
    config = config_with(micro_batch, **switches)
    policy, groups = setting(config)
    loss, kl, cut = written_loss(policy, config, groups)
    samples = 3 * 4 * len(TIMESTEPS)
    assert 0 < cut < samples
    gradients, measured = accumulated(config, policy, groups)
    assert_same(gradients, list(torch.autograd.grad(loss, list(policy.trainable().values()))))
    assert measured.pairs == 3 * len(TIMESTEPS)
    assert measured.mean("loss") == pytest.approx(loss.item(), rel=1e-9)
    assert measured.mean("clip_fraction") == pytest.approx(cut / samples)
    if config.objective.kl > 0:
        assert measured.mean("kl") == pytest.approx(kl.item(), rel=1e-9)
    else:
        assert measured.mean("kl") is None


@pytest.mark.parametrize("switches", [{}, {"kl": 0.3, "guidance": 2.0}], ids=str)
def test_micro_batches_give_one_gradient_in_float32(switches: dict[str, Any]) -> None:
    results = []
    for micro_batch in (1, 2, 4, 8):
        config = config_with(micro_batch, clip_range=1.0, **switches)
        results.append(accumulated(config, *setting(config, torch.float32))[0])
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_the_gradient_is_the_slope_of_the_loss() -> None:
    config = config_with(kl=0.2, clip_range=10.0)
    policy, groups = setting(config)
    gradients, _ = accumulated(config, policy, groups)
    here, width = policy.tensors(), 1e-5
    for seed in range(3):
        direction = {n: t - here[n] for n, t in policy.moved(1.0, seed=seed).items()}
        losses = []
        for sign in (1, -1):
            policy.install({n: here[n] + sign * width * direction[n] for n in here})
            losses.append(accumulated(config, policy, groups)[1].mean("loss"))
        policy.install(here)
        ahead, behind = losses
        assert ahead is not None and behind is not None
        expected = sum(float((g * d).sum()) for g, d in zip(gradients, direction.values(), strict=True))
        assert (ahead - behind) / (2 * width) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_on_policy_it_is_the_plain_policy_gradient(guidance: float) -> None:
    config = config_with(clip_range=1e-8, guidance=guidance)
    policy = ToyPolicy()
    groups = sampled_live_groups(2, policy, config)
    gradients, measured = accumulated(config, policy, groups)
    objective = make_objective(policy, config, make_schedule(config.rollout))
    assert isinstance(objective, FlowGrpo)
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        assert group.trajectory is not None
        for index in TIMESTEPS:
            mean, deviation = objective._gaussian(objective._batch([group], index, step=0))
            logs = Normal(mean, deviation).log_prob(group.trajectory[:, index + 1]).flatten(1).mean(dim=1)
            total = total - (group.advantages * logs).mean()
    expected = torch.autograd.grad(total / (2 * len(TIMESTEPS)), list(policy.trainable().values()))
    assert_same(gradients, list(expected))
    assert measured.mean("clip_fraction") == 0
    # Ratios are one: what is left of the loss is minus the mean advantage, zero in each group.
    assert measured.mean("loss") == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("advantage", "ratio", "cut"),
    [
        (2.0, 1.0 + 0.1 + 1e-9, True),
        (2.0, 1.0 + 0.1 - 1e-9, False),
        (2.0, 0.5, False),
        (-2.0, 1.0 - 0.1 - 1e-9, True),
        (-2.0, 1.0 - 0.1 + 1e-9, False),
        (-2.0, 2.0, False),
        (2.0, 1.0, False),
        (-2.0, 1.0, False),
        (0.0, 3.0, False),
    ],
)
def test_clip_borders(advantage: float, ratio: float, cut: bool) -> None:
    old = torch.tensor([-1.3], dtype=torch.float64)
    likelihood = (old + math.log(ratio)).requires_grad_()
    loss, held = clipped_surrogate(likelihood, old, torch.tensor([advantage], dtype=torch.float64), 0.1)
    (slope,) = torch.autograd.grad(loss.sum(), likelihood)
    assert bool(held) is cut
    assert not held.requires_grad
    assert float(slope) == pytest.approx(0 if cut else -advantage * ratio)
    assert float(loss.detach()) == pytest.approx(-advantage * (min(max(ratio, 0.9), 1.1) if cut else ratio))


@pytest.mark.parametrize("lacking", ["trajectory", "log_likelihoods"])
def test_a_group_without_its_trajectory_is_refused(lacking: str) -> None:
    config = config_with(4)
    policy, groups = setting(config)
    groups[1] = dataclasses.replace(groups[1], **{lacking: None})
    with pytest.raises(ValueError, match="group 11 came without its trajectory"):
        accumulated(config, policy, groups)
    with pytest.raises(ValueError, match="group 10 came without its trajectory"):
        accumulated(config, policy, live_groups(1))


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_the_order_of_groups_and_of_samples_changes_nothing(micro_batch: int) -> None:
    config, order = config_with(micro_batch, kl=0.2), [2, 0, 3, 1]
    policy, groups = setting(config)
    expected, _ = accumulated(config, policy, groups)
    permuted = [
        dataclasses.replace(
            group,
            latents=group.latents[order],
            advantages=group.advantages[order],
            trajectory=None if group.trajectory is None else group.trajectory[order],
            log_likelihoods=None if group.log_likelihoods is None else group.log_likelihoods[order],
        )
        for group in groups
    ]
    assert_same(accumulated(config, policy, permuted)[0], expected)
    assert_same(accumulated(config, policy, groups[::-1])[0], expected)


def test_final_latents_are_not_what_it_trains_on() -> None:
    config = config_with()
    policy, groups = setting(config)
    expected, _ = accumulated(config, policy, groups)
    other = [dataclasses.replace(group, latents=group.latents + 1) for group in groups]
    assert all(
        torch.equal(a, b) for a, b in zip(accumulated(config, policy, other)[0], expected, strict=True)
    )


@pytest.mark.parametrize(("switches", "forwards"), [({}, 1), ({"kl": 0.1}, 2)])
def test_no_forward_is_wasted(switches: dict[str, Any], forwards: int) -> None:
    config = config_with(**switches)
    policy, groups = setting(config)
    policy.forwards = 0
    accumulated(config, policy, groups)
    assert policy.forwards == forwards * 3 * 4 * len(TIMESTEPS)
