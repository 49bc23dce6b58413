"""Several ranks make the update that one rank makes, up to the order in which gradients are added."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_of_threads import Rigged, all_of, together
from torch import Tensor
from toy_policy import SHAPE, ToyPolicy, toy_config, training_groups
from toy_trajectories import objective_config, with_trajectories

from learner.checkpoint import read_checkpoint, write_checkpoint
from learner.follower import begin_together, follow, order_comparison
from learner.objectives.base import TrainingGroup
from learner.ranks import Order, Ranks, RanksDiffer
from learner.shares import RatedGroup, Share, hand_out, received, split
from learner.update import UpdateError, UpdateMetrics, Updater
from services.config import Config
from services.heartbeat import Pulse

STEPS = 5
CASES: dict[str, dict[str, Any]] = {
    "whole groups": {},
    "deferred weight": {"learner": {"micro_batch": 2}},
    "kl, two optimizer steps": {
        "objective": {"kl": 0.1, "clip_range": 1e-3, "reference_ramp": 0.1},
        "learner": {"optimizer_steps": 2, "micro_batch": 4},
    },
    "std of the step": {"advantage": {"std": "step"}},
    "frozen reference": {"objective": {"reference": "frozen", "kl": 0.1}},
    "reference of the rollout": {
        "objective": {"reference_of": "rollout", "clip_range": 1e-3},
        "queue": {"max_staleness": 2},
    },
    "diffusion_nft": {"objective": {"name": "diffusion_nft", "kl": 0.1}},
}
FIELDS = ("loss", "dsm", "group_weight", "group_score", "clip_fraction", "kl", "grad_norm")


def config_of(case: str) -> Config:
    sections = dict(CASES[case])
    objective = {"name": "dgpo"} | sections.pop("objective", {})
    if objective["name"] == "dgpo":
        objective = {"beta": 5.0, "clip_range": None} | objective
    learner = {"groups_per_step": 5} | sections.pop("learner", {})
    return objective_config(objective, learner=learner, **sections)


def groups_of(step: int) -> list[TrainingGroup]:
    """Five groups of one step; fewer and fewer of them have a preference, in the last step none."""
    flat = {0: (), 1: (3,), 2: (0, 2, 4), 3: (0, 1, 2, 4), 4: (0, 1, 2, 3, 4)}[step]
    return [
        dataclasses.replace(
            group,
            sampled_at=max(0, step - place % 3),
            rewards={"ocr": [0.5] * 4} if place in flat else group.rewards,
        )
        for place, group in enumerate(training_groups(5, seed=step))
    ]


Made = tuple[list[UpdateMetrics], dict[str, Tensor]]


def everything(updater: Updater) -> dict[str, Tensor]:
    return {f"{part}.{name}": t.clone() for part, held in updater.state().items() for name, t in held.items()}


def alone(config: Config, dtype: torch.dtype) -> Made:
    updater = Updater(ToyPolicy(dtype), config)
    made = [updater.step(groups_of(step), step) for step in range(STEPS)]
    return made, everything(updater)


def beat() -> Pulse:
    return Pulse("learner-1", lambda beat: None)


def followed(ranks: Ranks, updater: Updater) -> str | None:
    return follow(ranks, updater, beat(), beside_s=0, report=lambda: None)


def policies(count: int, dtype: torch.dtype = torch.float64) -> list[ToyPolicy]:
    """Made here: the generator that makes their weights is one for all threads."""
    return [ToyPolicy(dtype) for _ in range(count)]


def shared(config: Config, dtype: torch.dtype, count: int) -> list[Made]:
    made_of = policies(count, dtype)

    def body(ranks: Ranks) -> Made:
        policy = made_of[ranks.rank]
        updater = Updater(policy, config, ranks)
        if ranks.rank:
            policy.install(policy.moved(seed=ranks.rank))  # what rank 0 has is what counts
        begin_together(ranks, updater)
        if ranks.rank:
            followed(ranks, updater)
            return [], everything(updater)
        made = [updater.step(groups_of(step), step) for step in range(STEPS)]
        order_comparison(ranks, STEPS, updater)
        ranks.order_all(Order(do="end"))
        return made, everything(updater)

    return all_of(together(count, body))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_five_updates_are_those_of_one_rank(case: str, count: int, dtype: torch.dtype) -> None:
    config = config_of(case)
    expected, state = alone(config, dtype)
    (made, weights), *others = shared(config, dtype, count)
    for ours, theirs in zip(made, expected, strict=True):
        for field in FIELDS:
            wanted = getattr(theirs, field)
            wanted = wanted if wanted is None else pytest.approx(wanted, rel=1e-6, abs=1e-6)
            assert getattr(ours, field) == wanted, field
        assert ours.zero_variance_groups == theirs.zero_variance_groups
        assert ours.reward == theirs.reward
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, state[name], **close)
        for _, other in others:
            assert torch.equal(other[name], tensor), name


def test_ranks_share_trajectories_too() -> None:
    config = objective_config({"name": "flow_grpo", "kl": 0.1}, learner={"groups_per_step": 3})
    groups = with_trajectories(training_groups(3), ToyPolicy(), config)
    single = Updater(ToyPolicy(), config)
    expected = single.step(groups, 0)
    made_of = policies(2)

    def body(ranks: Ranks) -> Made:
        updater = Updater(made_of[ranks.rank], config, ranks)
        if ranks.rank:
            followed(ranks, updater)
            return [], everything(updater)
        made = updater.step(groups, 0)
        ranks.order_all(Order(do="end"))
        return [made], everything(updater)

    ((made,), weights), (_, other) = all_of(together(2, body))
    assert made.loss == pytest.approx(expected.loss, rel=1e-12)
    for name, tensor in everything(single).items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-9, atol=1e-12)
        assert torch.equal(other[name], weights[name])


def test_a_parameter_that_no_rank_moves_is_not_decayed() -> None:
    config = toy_config(learner={"weight_decay": 0.5})
    made_of = policies(2)

    def body(ranks: Ranks) -> tuple[Tensor, Tensor]:
        policy = made_of[ranks.rank]
        idle = policy.transformer.register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
        idle = policy._trainable["idle"] = policy.transformer.idle
        updater = Updater(policy, config, ranks)
        if ranks.rank:
            followed(ranks, updater)
        else:
            updater.step(training_groups(2), 0)
            ranks.order_all(Order(do="end"))
        return idle.detach().clone(), policy.transformer.inner.detach().clone()

    before = ToyPolicy().transformer.inner
    for idle, moved in all_of(together(2, body)):
        assert torch.equal(idle, torch.ones(3))
        assert not torch.equal(moved, before)


def test_two_ranks_go_on_bit_for_bit_and_other_numbers_from_the_same_files(tmp_path: Path) -> None:
    """Ten updates are five, a checkpoint and five more; and one and four ranks read the checkpoint of two."""
    config = config_of("kl, two optimizer steps")

    def groups(step: int) -> list[TrainingGroup]:
        return training_groups(5, seed=step)

    def train(count: int, steps: range, *, resume: bool, checkpoint: bool = False) -> dict[str, Tensor]:
        made_of = policies(count, torch.float32)

        def body(ranks: Ranks) -> dict[str, Tensor]:
            updater = Updater(made_of[ranks.rank], config, ranks)
            if resume and ranks.rank == 0:
                updater.load_state(read_checkpoint(tmp_path / "checkpoints" / "step-5").state)
            begin_together(ranks, updater)
            if ranks.rank:
                followed(ranks, updater)
                return everything(updater)
            for step in steps:
                updater.step(groups(step), step)
            if checkpoint:
                write_checkpoint(tmp_path, steps.stop, updater.state(), {"epoch": 0}, keep=1)
            ranks.order_all(Order(do="end"))
            return everything(updater)

        return all_of(together(count, body))[0]

    whole = train(2, range(10), resume=False)
    train(2, range(5), resume=False, checkpoint=True)
    resumed = train(2, range(5, 10), resume=True)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    single = Updater(ToyPolicy(torch.float32), config)
    single.load_state(read_checkpoint(tmp_path / "checkpoints" / "step-5").state)
    for step in range(5, 10):
        single.step(groups(step), step)
    for other in (everything(single), train(4, range(5, 10), resume=True)):
        for name, tensor in whole.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


def test_shares_are_whole_neighbouring_and_as_even_as_can_be() -> None:
    for count in range(9):
        for ranks in range(1, 6):
            parts = split(range(count), ranks)
            assert [one for part in parts for one in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert len(parts) == ranks


def test_a_share_arrives_as_it_was_sent() -> None:
    config = objective_config({"name": "flow_grpo"}, learner={"groups_per_step": 3})
    policy = ToyPolicy(torch.float32)
    groups = with_trajectories(groups_of(0), policy, config, dtype=torch.float32)
    groups[4].condition["pooled"] = torch.randn(7).to(torch.bfloat16)
    rated = [RatedGroup(group, torch.randn(4, dtype=torch.float64)) for group in groups]

    def body(ranks: Ranks) -> Share:
        if ranks.rank == 0:
            return hand_out(ranks, Share(3, 6, 5, rated))
        return received(*ranks.next_order(beside_s=0))

    zero, one = all_of(together(2, body))
    assert (one.step, one.groups, one.live) == (zero.step, zero.groups, zero.live) == (3, 6, 5)
    for ours, sent in zip([*zero.rated, *one.rated], rated, strict=True):
        assert torch.equal(ours.advantages, sent.advantages)
        for field in ("ordinal", "sampled_at"):
            assert getattr(ours.group, field) == getattr(sent.group, field)
        for field in ("latents", "trajectory", "log_likelihoods"):
            assert torch.equal(getattr(ours.group, field), getattr(sent.group, field))
        assert ours.group.condition.keys() == sent.group.condition.keys()
        for name, tensor in sent.group.condition.items():
            assert ours.group.condition[name].dtype == tensor.dtype
            assert torch.equal(ours.group.condition[name], tensor)


@pytest.mark.parametrize("what", ["weights", "frozen"])
def test_ranks_that_do_not_agree_say_so_loudly(what: str) -> None:
    config = config_of("frozen reference")
    made_of = policies(3)

    def body(ranks: Ranks) -> None:
        policy = made_of[ranks.rank]
        if what == "frozen" and ranks.rank == 2:
            assert policy._base is not None
            policy._base["time"][1] += 1e-9
        updater = Updater(policy, config, ranks)
        begin_together(ranks, updater)
        if ranks.rank == 2:
            with torch.no_grad():
                policy.transformer.inner[0, 0] += 1e-9
        if ranks.rank:
            followed(ranks, updater)
        else:
            order_comparison(ranks, 10, updater)

    errors = together(3, body)
    assert all(isinstance(error, RanksDiffer) for error in errors)
    when = "step 10" if what == "weights" else "the start, of the frozen model,"
    assert f"at {when} rank 2 holds other weights than rank 0" in str(errors[0])


def test_a_gradient_that_is_not_finite_ends_every_rank_alike() -> None:
    config = config_of("whole groups")
    made_of = policies(2)
    broken = groups_of(0)
    broken[4] = dataclasses.replace(broken[4], latents=torch.full((4, *SHAPE), float("inf")))

    def body(ranks: Ranks) -> None:
        updater = Updater(made_of[ranks.rank], config, ranks)
        if ranks.rank:
            followed(ranks, updater)
        else:
            updater.step(broken, 0)

    errors = together(2, body)
    assert all(isinstance(error, UpdateError) for error in errors)
    assert str(errors[0]) == str(errors[1])


def test_a_rank_that_fails_in_its_share_is_named_by_the_others() -> None:
    config = config_of("whole groups")
    made_of = policies(2)

    def body(ranks: Ranks) -> None:
        updater = Updater(made_of[ranks.rank], config, ranks)
        if ranks.rank == 0:
            updater.step(groups_of(0), 0)
        else:
            updater.objective.accumulate = _runs_out  # type: ignore[method-assign]
            followed(ranks, updater)

    zero, one = together(2, body)
    assert isinstance(one, Rigged)
    assert str(zero) == "rank 1: Rigged: out of memory"


def _runs_out(*groups: Any, **given: Any) -> Any:
    raise Rigged("out of memory")


def test_groups_that_rank_0_refuses_leave_the_others_listening() -> None:
    config = config_of("whole groups")
    made_of = policies(2)

    def body(ranks: Ranks) -> str | None:
        updater = Updater(made_of[ranks.rank], config, ranks)
        begin_together(ranks, updater)
        if ranks.rank:
            return followed(ranks, updater)
        with pytest.raises(ValueError, match="ordinals that differ"):
            updater.step([], 0)
        assert ranks.listening
        ranks.order_all(Order(do="end", reason="no groups"))
        return None

    assert all_of(together(2, body)) == [None, "no groups"]
