"""The guard against reward hacking."""

from __future__ import annotations

import pytest

from services.config import Config
from services.config_file import ConfigError, load_config
from services.guard import Guard
from services.metrics import Estimate, EvalRow, Spread, UpdateRow


def config(*overrides: str) -> Config:
    return load_config("quickstart", ["guard.drop={tesseract: 0.1}", "guard.window=2", *overrides])


def evaluation(step: int, ocr: float | None, tesseract: float | None, prompts: int = 8) -> EvalRow:
    rewards = {"ocr": Estimate(mean=ocr), "tesseract": Estimate(mean=tesseract)}
    return EvalRow(time=step, epoch=0, step=step, prompts=prompts, rewards=rewards)


def update(step: int, ocr: float, tesseract: float | None = None) -> UpdateRow:
    scored = {"ocr": ocr} if tesseract is None else {"ocr": ocr, "tesseract": tesseract}
    return UpdateRow(
        time=step,
        epoch=0,
        step=step,
        max_steps=99,
        seconds=1,
        reward_mean=ocr,
        reward_std=0.1,
        rewards={name: Spread(mean=mean) for name, mean in scored.items()},
    )


def test_a_heldout_reward_that_falls_while_the_trained_one_rises_fires_once() -> None:
    guard = Guard(config())
    assert guard.observe(evaluation(0, 0.4, 0.4)) == []
    assert guard.observe(evaluation(6, 0.6, 0.6)) == []
    assert guard.observe(evaluation(12, 0.7, 0.51)) == []
    (fall,) = guard.observe(evaluation(18, 0.8, 0.45))
    assert (fall.reward, fall.best.step, fall.now.step) == ("tesseract", 6, 18)
    assert "fell from 0.6 (step 6) to 0.45" in str(fall)
    assert "rose from 0.6 to 0.8" in str(fall)
    assert guard.observe(evaluation(24, 0.9, 0.3)) == []


def test_it_fires_again_after_a_recovery() -> None:
    guard = Guard(config())
    for step, tesseract in enumerate((0.6, 0.4, 0.6)):
        guard.observe(evaluation(step, 0.5 + step / 10, tesseract))
    assert guard.observe(evaluation(3, 0.9, 0.4)) != []


def test_both_falling_is_a_failure_of_training_and_not_of_the_reward() -> None:
    guard = Guard(config())
    guard.observe(evaluation(0, 0.6, 0.6))
    assert guard.observe(evaluation(1, 0.5, 0.3)) == []


def test_updates_are_compared_window_by_window() -> None:
    guard = Guard(config())
    rows = [update(1, 0.5, 0.9), update(2, 0.5), update(3, 0.6, 0.7), update(4, 0.6, 0.95)]
    assert [guard.observe(row) for row in rows] == [[]] * 4
    assert guard.observe(update(5, 0.9)) == []
    (fall,) = guard.observe(update(6, 0.7, 0.6))
    assert (fall.best.heldout, fall.now.heldout, fall.now.trained) == (0.9, 0.6, pytest.approx(0.8))
    assert "training groups" in str(fall)


def test_evaluations_are_not_compared_with_updates() -> None:
    guard = Guard(config())
    guard.observe(evaluation(0, 0.4, 0.9))
    assert [guard.observe(update(step, 0.9, 0.3)) for step in (1, 2)] == [[], []]


def test_evaluations_of_other_prompts_are_not_compared() -> None:
    guard = Guard(config())
    guard.observe(evaluation(0, 0.4, 0.9, prompts=320))
    assert guard.observe(evaluation(6, 0.6, 0.3)) == []
    (fall,) = guard.observe(evaluation(36, 0.9, 0.7, prompts=320))
    assert "in evaluations of 320 prompts" in str(fall)


def test_what_was_not_scored_is_passed_over() -> None:
    guard = Guard(config())
    guard.observe(evaluation(0, 0.4, 0.9))
    assert guard.observe(evaluation(1, 0.6, None)) == []
    assert guard.observe(evaluation(2, None, 0.1)) == []
    assert guard.observe(evaluation(3, 0.6, 0.1)) != []


def test_a_resumed_run_keeps_its_bests_and_fires_anew() -> None:
    guard = Guard(config())
    guard.remember([evaluation(0, 0.4, 0.9), evaluation(1, 0.5, 0.3)])
    assert guard.observe(evaluation(2, 0.6, 0.3)) != []


def test_nothing_is_guarded_unless_asked_for() -> None:
    guard = Guard(load_config("quickstart"))
    guard.observe(evaluation(0, 0.4, 0.9))
    assert guard.observe(evaluation(1, 0.9, 0.0)) == []


@pytest.mark.parametrize("name", ["ocr", "typo"])
def test_only_heldout_rewards_can_be_guarded(name: str) -> None:
    with pytest.raises(ConfigError, match=f"guard.drop names {name}; held-out rewards are: tesseract"):
        load_config("quickstart", [f"guard.drop={{{name}: 0.1}}"])


def test_a_drop_is_positive() -> None:
    with pytest.raises(ConfigError, match="greater than 0"):
        load_config("quickstart", ["guard.drop={tesseract: 0}"])
