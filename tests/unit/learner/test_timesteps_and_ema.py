"""Which steps are trained, and how averages decay: functions of (seed, step) alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.ema import Ema, evaluation_decay, reference_decay
from learner.seeds import derive_seed
from learner.timesteps import training_timesteps
from services.config import LearnerConfig, ObjectiveConfig, TimestepConfig


@given(
    first=st.integers(1, 20),
    parts=st.integers(1, 4),
    each=st.integers(1, 4),
    seed=st.integers(0, 5),
    step=st.integers(0, 500),
)
def test_distinct_steps_of_the_first_ones(first: int, parts: int, each: int, seed: int, step: int) -> None:
    if parts * each > first:
        return
    config = TimestepConfig(first=first, per_update=parts * each)
    drawn = training_timesteps(config, seed=seed, step=step, optimizer_steps=parts)
    flat = [index for part in drawn for index in part]
    assert [len(part) for part in drawn] == [each] * parts
    assert len(set(flat)) == len(flat)
    assert all(0 <= index < first for index in flat)
    assert drawn == training_timesteps(config, seed=seed, step=step, optimizer_steps=parts)


def test_every_step_gets_its_turn_and_seeds_differ() -> None:
    config = TimestepConfig(first=8, per_update=4)

    def drawn(seed: int) -> list[tuple[tuple[int, ...], ...]]:
        return [training_timesteps(config, seed=seed, step=step, optimizer_steps=2) for step in range(50)]

    counts = torch.bincount(
        torch.tensor([i for parts in drawn(0) for part in parts for i in part]), minlength=8
    )
    assert counts.sum() == 200
    assert int(counts.min()) > 10
    assert drawn(0) != drawn(1)


def test_an_uneven_split_is_refused() -> None:
    with pytest.raises(ValueError, match="3 timesteps cannot be split evenly over 2"):
        training_timesteps(TimestepConfig(first=4, per_update=3), seed=0, step=0, optimizer_steps=2)


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
    config = ObjectiveConfig(reference_decay=0.3, reference_ramp=0.001)
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
