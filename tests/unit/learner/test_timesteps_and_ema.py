"""Which steps are trained, and how averages decay: functions of (seed, step) alone."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.ema import Ema, evaluation_decay, reference_decay
from learner.timesteps import timestep_window, training_timesteps
from policy.schedule import make_schedule
from services.config import DgpoConfig, LearnerConfig, RolloutConfig, TimestepConfig
from services.seeds import derive_seed


@given(
    first=st.integers(1, 20),
    skip=st.integers(0, 5),
    draw=st.sampled_from(["uniform", "stratified"]),
    parts=st.integers(1, 4),
    each=st.integers(1, 4),
    seed=st.integers(0, 5),
    step=st.integers(0, 500),
)
def test_distinct_steps_inside_the_window(
    first: int,
    skip: int,
    draw: Literal["uniform", "stratified"],
    parts: int,
    each: int,
    seed: int,
    step: int,
) -> None:
    if parts * each > first:
        return
    config = TimestepConfig(first=first + skip, skip=skip, per_update=parts * each, draw=draw)
    window = timestep_window(config, torch.linspace(1, 0.01, 30), 1.0)
    assert window == range(skip, first + skip)
    drawn = training_timesteps(config, window, seed=seed, step=step, optimizer_steps=parts)
    flat = [index for part in drawn for index in part]
    assert [len(part) for part in drawn] == [each] * parts
    assert len(set(flat)) == len(flat)
    assert all(index in window for index in flat)
    if draw == "stratified":
        starts = [len(window) * part // len(flat) for part in range(len(flat))]
        assert len({bisect_right(starts, index - skip) for index in flat}) == len(flat)
    assert drawn == training_timesteps(config, window, seed=seed, step=step, optimizer_steps=parts)


def test_every_step_gets_its_turn_and_seeds_differ() -> None:
    config = TimestepConfig(first=8, per_update=4)

    def drawn(seed: int) -> list[tuple[tuple[int, ...], ...]]:
        return [
            training_timesteps(config, range(8), seed=seed, step=step, optimizer_steps=2)
            for step in range(50)
        ]

    counts = torch.bincount(
        torch.tensor([i for parts in drawn(0) for part in parts for i in part]), minlength=8
    )
    assert counts.sum() == 200
    assert int(counts.min()) > 10
    assert drawn(0) != drawn(1)


def test_an_uneven_split_is_refused() -> None:
    with pytest.raises(ValueError, match="3 timesteps cannot be split evenly over 2"):
        training_timesteps(TimestepConfig(first=4, per_update=3), range(4), seed=0, step=0, optimizer_steps=2)


def test_the_clip_by_time_before_and_after_the_shift() -> None:
    rollout = RolloutConfig(solver="euler", steps=10, shift=3.0)
    sigmas = make_schedule(rollout).sigmas
    times = sigmas / (3 - 2 * sigmas)
    before = TimestepConfig(first=None, t_min=0.3, per_update=2)
    assert timestep_window(before, sigmas, 3.0) == range(int((times >= 0.3).sum()))
    after = TimestepConfig(first=None, t_min=0.3, t_min_of="shifted", skip=1, per_update=2)
    assert timestep_window(after, sigmas, 3.0) == range(1, int((sigmas >= 0.3).sum()))
    # A bound that is a step is inside, whatever rounding makes of it.
    exact = torch.tensor([1.0, 0.9, 0.75, 0.5])  # shifted by 3 from 1, 0.75, 0.5, 0.25
    assert timestep_window(before.model_copy(update={"t_min": 0.5}), exact, 3.0) == range(3)


def test_a_window_too_small_is_refused() -> None:
    config = TimestepConfig(first=None, t_min=0.9, per_update=3)
    with pytest.raises(ValueError, match="draws 3 of the solver steps from 0 up to 2, which are 2"):
        timestep_window(config, torch.linspace(1, 0.1, 10), 1.0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"first": 3, "t_min": 0.5}, "give first or t_min"),
        ({"first": None}, "give first or t_min"),
        ({"first": 4, "t_min_of": "shifted"}, "there is no t_min"),
        (
            {"first": 4, "skip": 1, "per_update": 4},
            "per_update 4 exceeds the 3 steps that first 4 and skip 1",
        ),
    ],
)
def test_windows_that_contradict_themselves_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TimestepConfig(**settings)


def test_seeds_do_not_run_together() -> None:
    seeds = {derive_seed("noise", 1, 23), derive_seed("noise", 12, 3), derive_seed("noise", "1", 23)}
    assert len(seeds) == 3
    # Written down: a changed rule would break the resumption of every run.
    assert derive_seed("noise", 0, 1, 2, 3) == 5354827915991937641


def test_ema_closed_form() -> None:
    values = [torch.tensor([float(k), -float(k)]) for k in range(5)]
    ema = Ema({"w": values[0]})
    for value in values[1:]:
        ema.fold({"w": value}, 0.8)
    expected = 0.8**4 * values[0] + sum(0.2 * 0.8 ** (4 - k) * values[k] for k in range(1, 5))
    torch.testing.assert_close(ema.tensors["w"], expected)
    ema.fold({"w": values[2]}, 0.0)
    assert torch.equal(ema.tensors["w"], values[2])
    assert ema.tensors["w"].data_ptr() != values[2].data_ptr()


def test_decays() -> None:
    config = DgpoConfig(reference_decay=0.3, reference_ramp=0.001)
    assert [reference_decay(config, step) for step in (0, 100, 300, 900)] == [0.0, 0.1, 0.3, 0.3]
    learner = LearnerConfig(ema_decay=0.9, ema_every=8, max_steps=800)
    assert [evaluation_decay(learner, step) for step in (0, 6, 8)] == [None, None, None]
    assert evaluation_decay(learner, 7) == 8 / 17
    assert evaluation_decay(learner, 799) == 0.9


@pytest.mark.parametrize(("every", "steps"), [(8, 3), (8, 8), (8, 20), (1, 5)])
def test_the_last_update_is_in_the_evaluated_ema(every: int, steps: int) -> None:
    learner = LearnerConfig(ema_every=every, max_steps=steps)
    folded = [step + 1 for step in range(steps) if evaluation_decay(learner, step) is not None]
    assert folded == sorted({*range(every, steps + 1, every), steps})
