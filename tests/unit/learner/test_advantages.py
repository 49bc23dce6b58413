"""Advantages: what the mathematics says, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import group_advantages, preferences, total_rewards
from services.config import AdvantageConfig, RewardConfig

OCR = RewardConfig(name="ocr", app="ocr", weight=2.0)
TASTE = RewardConfig(name="taste", app="ocr", weight=-0.5, required=False)
GROUPS = st.lists(
    st.lists(st.integers(-50, 50), min_size=4, max_size=4).map(lambda row: [r / 10 for r in row]),
    min_size=1,
    max_size=5,
)


def test_total_is_the_weighted_sum_of_the_trained_rewards() -> None:
    rewards = {"ocr": [1.0, 0.0], "taste": [2.0, 4.0], "heldout": [9.0, 9.0]}
    assert total_rewards(rewards, [OCR, TASTE]).tolist() == [1.0, -2.0]


def test_a_range_brings_a_reward_to_the_scale_of_the_others() -> None:
    picked = RewardConfig(name="picked", app="ocr", weight=3.0, range=(20.0, 24.0))
    rewards = {"ocr": [1.0, 0.0, 0.5], "picked": [20.0, 24.0, 25.0]}
    assert total_rewards(rewards, [OCR, picked]).tolist() == [2.0, 3.0, 4.75]


def test_an_optional_reward_drops_its_term_and_a_required_one_is_an_error() -> None:
    assert total_rewards({"ocr": [1.0, 0.0]}, [OCR, TASTE]).tolist() == [2.0, 0.0]
    with pytest.raises(ValueError, match="rewards ocr are absent; the group has taste"):
        total_rewards({"taste": [1.0, 0.0]}, [OCR, TASTE])
    with pytest.raises(ValueError, match="rewards taste are absent; the group has none"):
        total_rewards({}, [TASTE])


def test_a_score_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="ocr has a score that is not finite"):
        total_rewards({"ocr": [1.0, float("inf")]}, [OCR])
    with pytest.raises(ValueError, match="different lengths"):
        total_rewards({"ocr": [1.0], "taste": [1.0, 2.0]}, [OCR, TASTE])


def test_std_of_the_group_or_of_the_step() -> None:
    totals = torch.tensor([[0.0, 2.0], [10.0, 14.0]], dtype=torch.float64)
    group = group_advantages(totals, AdvantageConfig(std="group", epsilon=1e-4)).values
    expected = torch.tensor([[-1 / 1.0001, 1 / 1.0001], [-2 / 2.0001, 2 / 2.0001]], dtype=torch.float64)
    torch.testing.assert_close(group, expected)
    std = float(totals.std(correction=0))
    step = group_advantages(totals, AdvantageConfig(std="step", epsilon=0.5)).values
    expected = torch.tensor([[-1.0, 1.0], [-2.0, 2.0]], dtype=torch.float64) / (std + 0.5)
    torch.testing.assert_close(step, expected)


def test_clamp() -> None:
    totals = torch.tensor([[0.0] * 99 + [1.0]], dtype=torch.float64)
    values = group_advantages(totals, AdvantageConfig(clip=5.0)).values
    assert float(values.max()) == 5.0


@pytest.mark.parametrize("std", ["group", "step"])
def test_an_all_equal_group_is_exactly_zero(std: str) -> None:
    # The mean of these is not exactly 0.1 in floating point.
    totals = torch.tensor([[0.1] * 7, [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    found = group_advantages(totals, AdvantageConfig.model_validate({"std": std}))
    assert found.live.tolist() == [False, True]
    assert found.values[0].tolist() == [0.0] * 7
    assert bool((found.values[1] != 0).all())


@given(groups=GROUPS, constant=st.integers(-100, 100), order=st.permutations(range(4)))
def test_constants_and_permutations(groups: list[list[float]], constant: int, order: list[int]) -> None:
    config = AdvantageConfig(std="group")
    totals = torch.tensor(groups, dtype=torch.float64)
    found = group_advantages(totals, config)
    shifted = group_advantages(totals + constant, config)
    torch.testing.assert_close(shifted.values, found.values, rtol=1e-6, atol=1e-6)
    permuted = group_advantages(totals[:, order], config).values
    torch.testing.assert_close(permuted, found.values[:, order])
    torch.testing.assert_close(found.values.sum(dim=1), torch.zeros(len(groups), dtype=torch.float64))


def test_a_total_too_large_to_be_squared_is_an_error() -> None:
    with pytest.raises(ValueError, match="beyond 1e"):
        total_rewards({"ocr": [1e308, 0.0], "taste": [0.0, 0.0]}, [OCR, TASTE])


def test_normalized_rewards_count_by_weight_and_not_by_scale() -> None:
    # `wide` spans a thousand times what `ocr` does, and prefers the opposite.
    rewards = [{"ocr": [0.0, 0.1, 0.2, 0.3], "wide": [300.0, 200.0, 100.0, 0.0]}]
    trained = [OCR, RewardConfig(name="wide", app="ocr")]
    drowned = preferences(rewards, trained, AdvantageConfig(combine="sum"))
    assert drowned[0].argsort().tolist() == [3, 2, 1, 0]
    fair = preferences(rewards, trained, AdvantageConfig(combine="normalized", epsilon=1e-9))
    unit = torch.tensor([-3, -1, 1, 3], dtype=torch.float64) / 5**0.5
    torch.testing.assert_close(fair[0], 2 * unit - unit)


def test_normalized_by_the_step_and_with_an_optional_reward_absent() -> None:
    rewards = [{"ocr": [0.0, 2.0], "taste": [1.0, 1.0]}, {"ocr": [0.0, 6.0]}]
    ranked = preferences(
        rewards, [OCR, TASTE], AdvantageConfig(combine="normalized", std="step", epsilon=1.0)
    )
    std = float(torch.tensor([0.0, 2.0, 0.0, 6.0], dtype=torch.float64).std(correction=0))
    expected = 2 * torch.tensor([[-1.0, 1.0], [-3.0, 3.0]], dtype=torch.float64) / (std + 1)
    torch.testing.assert_close(ranked, expected)


def test_rewards_that_cancel_are_no_preference() -> None:
    rewards = [{"ocr": [0.5, 0.5, 0.5], "taste": [0.1, 0.1, 0.1]}]
    ranked = preferences(rewards, [OCR, TASTE], AdvantageConfig(combine="normalized"))
    assert not group_advantages(ranked, AdvantageConfig()).live.any()


@pytest.mark.parametrize(
    ("totals", "expected"),
    [
        ([0.1, 0.2, 0.3], [-1.5, 0.0, 1.5]),
        ([0.3, 0.1 + 0.2, 0.3, 0.3], [0.0, 0.0, 0.0, 0.0]),
        ([0.3, math.nextafter(0.3, 1)], [0.0, 0.0]),
    ],
)
def test_rounding_is_no_preference(totals: list[float], expected: list[float]) -> None:
    found = group_advantages(torch.tensor([totals], dtype=torch.float64), AdvantageConfig(weights="equal"))
    assert found.values.tolist() == [expected]
    assert found.live.tolist() == [any(expected)]


def test_normalized_rewards_that_cancel_but_for_rounding_are_no_preference() -> None:
    rewards = [{"ocr": [0.1, 0.2, 0.3, 0.7], "taste": [0.9, 0.8, 0.7, 0.3]}]
    trained = [RewardConfig(name=name, app="ocr") for name in ("ocr", "taste")]
    config = AdvantageConfig(combine="normalized", weights="equal")
    found = group_advantages(preferences(rewards, trained, config), config)
    assert not found.live.any() and not found.values.any()


@given(GROUPS)
def test_equal_weights_sum_to_zero_and_keep_the_sign(rows: list[list[float]]) -> None:
    totals = torch.tensor(rows, dtype=torch.float64)
    graded = group_advantages(totals, AdvantageConfig()).values
    found = group_advantages(totals, AdvantageConfig(weights="equal"))
    equal = found.values
    assert torch.equal(equal.sign(), graded.sign())
    assert equal.sum(dim=1).abs().max() < 1e-12
    for row in equal[found.live]:
        assert float(row.abs().mean()) == pytest.approx(1.0)
        assert len(set(row[row > 0].tolist())) == len(set(row[row < 0].tolist())) == 1
