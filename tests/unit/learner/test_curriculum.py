"""Which places of the prompts ordinals take, when groups without a difference are left out."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from learner.checkpoint import read_checkpoint, write_checkpoint
from learner.curriculum import LONGEST_SKIP, PART, Curriculum, curriculum_of
from services.config import Config
from services.config_file import ConfigError, load_config
from services.messages import Prompt
from services.queue_types import Frontier
from services.record import recorder_config


class Numbered:
    """`count` prompts over and over, in order."""

    def __init__(self, count: int) -> None:
        self.count = count

    def training(self, seed: int, ordinal: int) -> Prompt:
        return Prompt(text=f"prompt {ordinal % self.count}")

    def heldout(self, seed: int, count: int) -> list[Prompt]:
        return []


def configured(*overrides: str) -> Config:
    """One group a step, no staleness, no dead letters: assigned when the ordinal before is trained."""
    return load_config(
        "quickstart",
        [
            "prompts.curriculum={after: 2, revisit: 0}",
            "learner.groups_per_step=1",
            "queue.max_staleness=0",
            "queue.max_dead=0",
            *overrides,
        ],
    )


def group(text: str, scores: Sequence[float]) -> Any:
    return SimpleNamespace(header=SimpleNamespace(prompt=Prompt(text=text), rewards={"ocr": tuple(scores)}))


class Trained:
    """A run of one group a step: what each ordinal's prompt was."""

    def __init__(self, curriculum: Curriculum, source: Numbered, hopeless: set[int]) -> None:
        self.curriculum, self.source, self.hopeless = curriculum, source, hopeless
        self.told: list[int] = []
        curriculum.assign(Frontier())

    def steps(self, count: int) -> list[int]:
        for _ in range(count):
            ordinal = len(self.told)
            place = self.curriculum.places()[ordinal]
            number = place % self.source.count
            self.told.append(place)
            scores = [0.5, 0.5] if number in self.hopeless else [0.0, 1.0]
            self.curriculum.observe([group(f"prompt {number}", scores)])
            self.curriculum.assign(Frontier(below=ordinal + 1))
        return self.told


def test_prompts_with_a_difference_keep_their_places() -> None:
    source = Numbered(4)
    run = Trained(Curriculum(configured(), source), source, hopeless=set())
    assert run.steps(40) == list(range(40))


def test_a_prompt_is_left_out_after_so_many_groups_without_a_difference() -> None:
    source = Numbered(4)
    run = Trained(Curriculum(configured(), source), source, hopeless={1, 2})
    places = run.steps(16)
    assert places[:8] == list(range(8))
    assert places[8:] == [8, 11, 12, 15, 16, 19, 20, 23]


def test_one_group_with_a_difference_brings_a_prompt_back() -> None:
    curriculum = Curriculum(configured("prompts.curriculum.revisit=1"), Numbered(2))
    same, different = group("prompt 0", [1, 1]), group("prompt 0", [0, 1])
    curriculum.observe([same, different, same])
    assert curriculum.state()["streaks"].tolist() == [1]


def test_a_group_of_equal_scores_is_without_a_difference_whatever_they_are() -> None:
    curriculum = Curriculum(configured(), Numbered(2))
    curriculum.observe([group("prompt 0", [0.1] * 24)])
    assert curriculum.state()["streaks"].tolist() == [1]
    curriculum.observe([group("prompt 1", [0.3, 0.1 + 0.2, 0.3])])
    assert curriculum.state()["streaks"].tolist() == [1, 1]
    tolerant = Curriculum(configured("prompts.curriculum.min_std=0.02"), Numbered(2))
    tolerant.observe([group("prompt 0", [0.5, 0.53]), group("prompt 1", [0.5, 0.55])])
    assert tolerant.state()["streaks"].tolist() == [1]


def test_a_share_of_what_is_left_out_is_visited_all_the_same() -> None:
    source = Numbered(2)
    run = Trained(Curriculum(configured("prompts.curriculum.revisit=0.25"), source), source, hopeless={1})
    places = run.steps(1000)
    visited = sum(place % 2 for place in places)
    candidates = places[-1] / 2
    assert abs(visited / candidates - 0.25) < 0.07
    again = Trained(Curriculum(configured("prompts.curriculum.revisit=0.25"), source), source, hopeless={1})
    assert again.steps(1000) == places


def test_where_no_prompt_has_a_difference_ordinals_still_get_one() -> None:
    source = Numbered(1)
    run = Trained(Curriculum(configured(), source), source, hopeless={0})
    places = run.steps(4)
    assert places == [0, 1, 2 + LONGEST_SKIP, 2 + LONGEST_SKIP + 1 + LONGEST_SKIP]


@pytest.mark.parametrize("at", [1, 7, 20])
def test_going_on_from_a_checkpoint_is_going_on(at: int, tmp_path: Any) -> None:
    source = Numbered(5)
    undisturbed = Trained(Curriculum(configured(), source), source, hopeless={0, 3}).steps(40)
    first = Trained(Curriculum(configured(), source), source, hopeless={0, 3})
    first.steps(at)
    path = write_checkpoint(tmp_path, at, {PART: first.curriculum.state()}, {}, keep=1)
    second = Trained.__new__(Trained)
    second.__dict__ |= first.__dict__ | {"curriculum": Curriculum(configured(), source)}
    second.curriculum.load_state(read_checkpoint(path).state)
    assert second.curriculum.assign(Frontier(below=at)) == 0
    assert second.steps(40 - at) == undisturbed


def test_assignments_reach_as_far_as_ordinals_may_be_issued() -> None:
    config = configured("learner.groups_per_step=4", "queue.max_staleness=2", "queue.max_dead=3")
    curriculum = Curriculum(config, Numbered(9))
    curriculum.assign(Frontier())
    assert list(curriculum.places()) == list(range(3 * 4 + 3))
    curriculum.assign(Frontier(below=3, above=(5,), dead=(1,)))
    assert list(curriculum.places()) == list(range(3, 3 + 3 * 4 + 3))


def test_a_checkpoint_without_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="knows of none"):
        Curriculum(configured(), Numbered(1)).load_state({})


def test_it_is_off_unless_asked_for_and_never_for_a_recording() -> None:
    assert curriculum_of(load_config("quickstart")) is None
    assert curriculum_of(configured()) is not None
    with pytest.raises(ConfigError, match=r"curriculum\.after=0"):
        recorder_config(configured(), 8)
