"""An update is a pure function of weights, groups and step, and can be stopped and continued exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_policy import SHAPE, ToyPolicy, toy_config, training_groups

from learner.advantages import group_advantages, total_rewards
from learner.checkpoint import newest_checkpoint, write_checkpoint
from learner.ema import reference_decay
from learner.objectives.base import LiveGroup, TrainingGroup, make_objective
from learner.timesteps import training_timesteps
from learner.update import UpdateError, Updater, learning_rate
from policy import load_policy
from policy.schedule import make_schedule
from services.config import Config, LearnerConfig, LoraConfig, ModelConfig

REFERENCES = [
    {"reference": "ema", "reference_decay": 0.0, "clip_range": 1e-3},
    {"reference": "ema", "reference_decay": 0.3, "reference_ramp": 0.1, "clip_range": 1e-3, "kl": 0.1},
    {"reference": "frozen", "clip_range": None, "kl": 0.1},
]


def config_with(objective: dict[str, Any], **sections: Any) -> Config:
    whole = {"beta": 50.0, "timesteps": {"first": 3, "per_update": 2}, **objective}
    return toy_config(objective=whole, **sections)


def weights(updater: Updater) -> list[Tensor]:
    return [p.detach().clone() for p in updater.policy.trainable().values()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def everything(updater: Updater) -> list[Tensor]:
    return [t.clone() for part in updater.state().values() for t in part.values()]


@pytest.mark.parametrize("objective", REFERENCES, ids=str)
def test_an_update_is_the_formula_then_adamw(objective: dict[str, Any]) -> None:
    config = config_with(
        objective, learner={"learning_rate": 0.01, "max_grad_norm": 0.05, "weight_decay": 0.1}
    )
    updater, twin = Updater(ToyPolicy(), config), ToyPolicy()
    optimizer = torch.optim.AdamW(
        list(twin.trainable().values()), lr=0.01, weight_decay=0.1, foreach=False, fused=False
    )
    schedule = make_schedule(config.rollout)
    formula = make_objective(twin, config, schedule)
    reference = twin.tensors()
    for step in range(3):
        groups = training_groups(2, seed=step)
        updater.step(groups, step)
        totals = torch.stack([total_rewards(g.rewards, config.trained_rewards) for g in groups])
        values = group_advantages(totals, config.advantage).values
        live = [
            LiveGroup(g.ordinal, g.latents.double(), a, g.condition)
            for g, a in zip(groups, values, strict=True)
        ]
        clip = config.objective.timesteps
        (part,) = training_timesteps(clip, range(3), seed=0, step=step, optimizer_steps=1)
        optimizer.zero_grad()
        formula.accumulate(live, part, step=step, scale=1 / 4, reference=reference)
        torch.nn.utils.clip_grad_norm_(twin.trainable().values(), 0.05)
        optimizer.step()
        decay = reference_decay(config.objective, step + 1)
        now = twin.tensors()
        reference = {name: decay * reference[name] + (1 - decay) * now[name] for name in reference}
        for ours, theirs in zip(weights(updater), twin.tensors().values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_order_of_groups_and_repetition_change_no_bit() -> None:
    config = config_with(REFERENCES[1], learner={"optimizer_steps": 2, "micro_batch": 4})
    results = []
    for order in ((0, 1, 2), (2, 0, 1), (0, 1, 2)):
        updater = Updater(ToyPolicy(torch.float32), config)
        for step in range(3):
            groups = training_groups(3, seed=step)
            updater.step([groups[place] for place in order], step)
        results.append(everything(updater))
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


def test_a_constant_added_to_all_rewards_changes_nothing() -> None:
    def run(constant: float) -> list[Tensor]:
        updater = Updater(ToyPolicy(), config_with(REFERENCES[0]))
        groups = training_groups(2)
        updater.step(
            [
                dataclasses.replace(g, rewards={"ocr": [r + constant for r in g.rewards["ocr"]]})
                for g in groups
            ],
            0,
        )
        return weights(updater)

    for ours, theirs in zip(run(3.0), run(0.0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_permuting_samples_within_a_group_changes_nothing() -> None:
    def run(order: list[int]) -> list[Tensor]:
        updater = Updater(ToyPolicy(), config_with(REFERENCES[0]))
        updater.step(
            [
                dataclasses.replace(
                    g, latents=g.latents[order], rewards={"ocr": [g.rewards["ocr"][i] for i in order]}
                )
                for g in training_groups(2)
            ],
            0,
        )
        return weights(updater)

    for ours, theirs in zip(run([3, 1, 0, 2]), run([0, 1, 2, 3]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_an_all_equal_group_adds_nothing_and_keeps_the_scale() -> None:
    config = config_with(REFERENCES[1])
    flat = dataclasses.replace(training_groups(3)[2], rewards={"ocr": [0.7] * 4})
    policy = ToyPolicy()
    gradients = {}
    for name, groups in {"with": [*training_groups(2), flat], "without": training_groups(2)}.items():
        updater = Updater(policy, config)
        caught: list[Tensor] = []
        updater.trained.optimize = lambda rate, step, into=caught: (  # type: ignore[method-assign,misc]
            into.extend(p.grad.clone() for p in policy.trainable().values()) or torch.zeros(())
        )
        metrics = updater.step(groups, 0)
        assert metrics.zero_variance_groups == (1 if name == "with" else 0)
        gradients[name] = caught
    for with_flat, without in zip(gradients["with"], gradients["without"], strict=True):
        torch.testing.assert_close(with_flat * 3, without * 2)


def test_an_update_without_any_preference_leaves_the_weights() -> None:
    updater = Updater(ToyPolicy(), config_with(REFERENCES[1]))
    updater.step(training_groups(2), 0)
    before = weights(updater)
    flat = [dataclasses.replace(g, rewards={"ocr": [1.0] * 4}) for g in training_groups(2)]
    metrics = updater.step(flat, 1)
    assert equal(weights(updater), before)
    assert (metrics.zero_variance_groups, metrics.loss, metrics.grad_norm) == (2, None, None)
    assert metrics.row()["reward_mean"] == 1.0


@pytest.mark.parametrize("objective", [*REFERENCES, REFERENCES[1] | {"reference_of": "rollout"}], ids=str)
def test_a_continuation_is_bit_identical(objective: dict[str, Any], tmp_path: Path) -> None:
    config = config_with(
        objective, queue={"max_staleness": 2}, learner={"optimizer_steps": 2, "ema_every": 2}
    )
    straight = Updater(ToyPolicy(torch.float32), config)
    for step in range(6):
        straight.step(sampled([max(0, step - 2), step], seed=step), step)
        if step == 2:
            write_checkpoint(tmp_path, 3, straight.state(), {"epoch": 0}, keep=1)
    resumed = Updater(ToyPolicy(torch.float32), config)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    resumed.load_state(found.state)
    for step in range(found.step, 6):
        resumed.step(sampled([max(0, step - 2), step], seed=step), step)
    assert equal(everything(resumed), everything(straight))


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_real_policy_is_continued_exactly(model_config: ModelConfig, train: str) -> None:
    model = model_config.model_copy(update={"train": train, "lora": LoraConfig(rank=2, alpha=4)})
    config = config_with(REFERENCES[0], rollout={"group_size": 2, "steps": 4}, learner={"micro_batch": 2})
    config = config.model_copy(update={"model": model})

    def groups(step: int) -> list[Any]:
        generator = torch.Generator().manual_seed(step)
        condition = encoder.encode('a sign that says "K7QX"')
        return [
            dataclasses.replace(
                group,
                latents=torch.randn(2, 4, 8, 16, generator=generator),
                rewards={"ocr": [0.0, 1.0]},
                condition=condition,
            )
            for group in training_groups(2, seed=step, size=2)
        ]

    encoder = load_policy(model, text_encoders=True, vae=False)
    straight = Updater(load_policy(model, text_encoders=False, vae=False), config)
    start = weights(straight)
    straight.step(groups(0), 0)
    assert not equal(weights(straight), start)
    resumed = Updater(load_policy(model, text_encoders=False, vae=False, seed=3), config)
    resumed.load_state(straight.state())
    for updater in (straight, resumed):
        updater.step(groups(1), 1)
    assert equal(everything(resumed), everything(straight))


def test_state_of_another_model_is_refused() -> None:
    updater = Updater(ToyPolicy(), config_with(REFERENCES[0]))
    state = {part: dict(tensors) for part, tensors in updater.state().items()}
    before = everything(updater)
    with pytest.raises(ValueError, match="has parts"):
        updater.load_state({name: state[name] for name in state if name != "reference"})
    del state["optimizer"]["exp_avg.inner"]
    with pytest.raises(ValueError, match=r"state of optimizer: 1 .*exp_avg\.inner"):
        updater.load_state(state)
    state = {part: dict(tensors) for part, tensors in updater.state().items()}
    state["policy"]["outer"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"state of policy: 1 .*outer"):
        updater.load_state(state)
    assert equal(everything(updater), before)


def test_ema_and_reference_follow_their_closed_forms() -> None:
    objective = {"reference": "ema", "reference_decay": 0.3, "reference_ramp": 0.1, "switch_step": 3}
    config = config_with(objective, learner={"ema_decay": 0.5, "ema_every": 2})
    updater = Updater(ToyPolicy(), config)
    history = [updater.policy.tensors()]
    for step in range(6):
        updater.step(training_groups(2, seed=step), step)
        history.append(updater.policy.tensors())
    reference = history[0]
    ema = history[0]
    for step in range(6):
        decay = min(0.3, 0.1 * (step + 1))
        reference = {n: decay * reference[n] + (1 - decay) * t for n, t in history[step + 1].items()}
        if step in (1, 3, 5):
            decay = min(0.5, (1 + step) / (10 + step))
            ema = {n: decay * ema[n] + (1 - decay) * t for n, t in history[step + 1].items()}
    for name, tensor in updater.ema_tensors().items():
        torch.testing.assert_close(tensor, ema[name])
    for name, tensor in updater.rollout_tensors(6).items():
        torch.testing.assert_close(tensor, reference[name])
    assert all(torch.equal(t, history[-1][n]) for n, t in updater.rollout_tensors(2).items())


def sampled(at: list[int], seed: int) -> list[TrainingGroup]:
    groups = training_groups(len(at), seed=seed)
    return [dataclasses.replace(group, sampled_at=step) for group, step in zip(groups, at, strict=True)]


def test_a_stale_group_is_compared_with_the_reference_of_its_rollout() -> None:
    objective = REFERENCES[0] | {"clip_range": 1e-4, "reference_of": "rollout"}
    config = config_with(objective, queue={"max_staleness": 2}, learner={"learning_rate": 0.01})
    updater = Updater(ToyPolicy(), config)
    history = [updater.policy.tensors()]
    for step, at in enumerate(([0, 0, 0], [0, 1, 0], [0, 1, 2], [1, 3, 2])):
        groups = sampled(at, seed=step)
        twin = ToyPolicy()
        twin.install(updater.policy.tensors())
        updater.step(groups, step)
        history.append(updater.policy.tensors())
    totals = torch.stack([total_rewards(g.rewards, config.trained_rewards) for g in groups])
    values = group_advantages(totals, config.advantage).values
    (part,) = training_timesteps(config.objective.timesteps, range(3), seed=0, step=3, optimizer_steps=1)
    formula = make_objective(twin, config, make_schedule(config.rollout))
    cut = 0
    for group, advantages in zip(groups, values, strict=True):
        live = LiveGroup(group.ordinal, group.latents.double(), advantages, group.condition)
        assert group.sampled_at is not None
        gained = formula.accumulate([live], part, step=3, scale=1 / 6, reference=history[group.sampled_at])
        cut += float(gained.sums["clip_fraction"]) > 0
    expected = [p.grad for p in twin.trainable().values()]
    assert cut, "nothing has moved: the test would not see the clip"
    seen: list[Tensor] = []
    again = Updater(ToyPolicy(), config)
    for step, at in enumerate(([0, 0, 0], [0, 1, 0], [0, 1, 2])):
        again.step(sampled(at, seed=step), step)
    again.trained.optimize = lambda rate, step: (  # type: ignore[method-assign]
        seen.extend(p.grad.clone() for p in again.policy.trainable().values() if p.grad is not None)
        or torch.zeros(())
    )
    again.step(groups, 3)
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_without_staleness_it_does_not_matter_whose_reference() -> None:
    ends = []
    for reference_of in ("update", "rollout"):
        config = config_with(REFERENCES[1] | {"reference_of": reference_of}, queue={"max_staleness": 2})
        updater = Updater(ToyPolicy(), config)
        for step in range(3):
            updater.step(sampled([step, step], seed=step), step)
        ends.append(weights(updater))
    assert equal(*ends)


def test_by_default_all_groups_are_compared_with_the_reference_of_now() -> None:
    ends = []
    for stale in (0, 1):
        updater = Updater(ToyPolicy(), config_with(REFERENCES[0], queue={"max_staleness": 2}))
        for step in range(3):
            updater.step(sampled([max(0, step - stale)] * 2, seed=step), step)
        ends.append(weights(updater))
    assert equal(*ends)


def test_without_a_reference_none_is_kept() -> None:
    updater = Updater(ToyPolicy(), config_with({"reference": "frozen", "clip_range": None}))
    assert set(updater.state()) == {"policy", "ema", "optimizer"}


def test_decay_zero_never_computes_a_reference_in_the_first_optimizer_step() -> None:
    for optimizer_steps, forwards in ((1, 2), (2, 3)):
        learner = {"optimizer_steps": optimizer_steps}
        policy = ToyPolicy()
        updater = Updater(policy, config_with(REFERENCES[0], learner=learner))
        for step in range(3):
            policy.forwards = 0
            updater.step(training_groups(2, seed=step), step)
            assert policy.forwards == forwards * 2 * 4


def test_metrics_say_what_happened() -> None:
    config = config_with(
        REFERENCES[1],
        rewards=[
            {"name": "ocr", "app": "ocr"},
            {"name": "other", "app": "ocr_tesseract", "heldout": True},
        ],
    )
    groups = [
        dataclasses.replace(g, rewards={"ocr": [0.0, 1.0, 0.0, 1.0], "other": [2.0, 2.0, 2.0, 2.0]})
        for g in training_groups(2)
    ]
    metrics = Updater(ToyPolicy(), config).step(groups, 0)
    row = metrics.row()
    assert row["reward_mean"] == 0.5
    assert row["reward_std"] == 0.5
    quantiles = {"p10": 0.0, "p50": 0.5, "p90": 1.0}, {"p10": 2.0, "p50": 2.0, "p90": 2.0}
    assert row["rewards"] == {
        "ocr": {"mean": 0.5, "std": 0.5} | quantiles[0],
        "other": {"mean": 2.0, "std": 0.0} | quantiles[1],
    }
    assert row["group_weight"] == 0.5
    assert row["kl"] == 0.0
    assert row["learning_rate"] == 0.01
    assert row["grad_norm"] > 0
    assert {"forward", "backward", "optimizer", "ema"} <= metrics.seconds.keys()


def test_the_row_fits_the_run_s_metrics() -> None:
    from services.metrics import UpdateRow

    row = Updater(ToyPolicy(), config_with(REFERENCES[0])).step(training_groups(2), 0).row()
    UpdateRow.model_validate({**row, "time": 0.0, "epoch": 0, "step": 1, "max_steps": 5, "seconds": 1.0})


def test_groups_that_break_the_contract_are_named() -> None:
    updater = Updater(ToyPolicy(), config_with(REFERENCES[0]))
    one, other = training_groups(2)
    before = everything(updater)
    for groups, message in (
        ([], "ordinals that differ"),
        ([one, one], r"ordinals that differ, got \[10, 10\]"),
        ([one, dataclasses.replace(other, latents=other.latents[:3])], "group 11: latents are"),
        ([one, dataclasses.replace(other, rewards={"ocr": [1.0, 2.0]})], "group 11: 2 scores for 4"),
        ([one, dataclasses.replace(other, rewards={})], "group 11: rewards ocr are absent"),
        (
            [one, dataclasses.replace(other, rewards={"ocr": [1.0, float("nan"), 0, 0]})],
            "group 11: .*not finite",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            updater.step(groups, 0)
    assert equal(everything(updater), before)


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    updater = Updater(ToyPolicy(), config_with(REFERENCES[0]))
    before = everything(updater)
    groups = training_groups(2)
    broken = dataclasses.replace(groups[0], latents=torch.full((4, *SHAPE), float("inf")))
    with pytest.raises(UpdateError, match="update 4: the gradient is not finite"):
        updater.step([broken, groups[1]], 4)
    assert equal(everything(updater), before)


def test_learning_rate_schedule() -> None:
    constant = LearnerConfig(learning_rate=0.1)
    assert [learning_rate(constant, step) for step in (0, 50)] == [0.1, 0.1]
    config = LearnerConfig(learning_rate=0.1, warmup_steps=4, final_learning_rate=0.01, max_steps=24)
    assert [learning_rate(config, step) for step in (0, 1, 3)] == pytest.approx([0.025, 0.05, 0.1])
    assert learning_rate(config, 4) == pytest.approx(0.1)
    assert learning_rate(config, 14) == pytest.approx((0.1 + 0.01) / 2)
    assert [learning_rate(config, step) for step in (24, 99)] == pytest.approx([0.01, 0.01])
