"""Which announced weights are evaluated, and what becomes of an evaluation whose weights are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions

from services import evaluation_schedule
from services.config_file import load_config
from services.evaluation_schedule import EvaluationSchedule
from services.messages import PolicyVersion, WeightsAnnouncement
from services.metrics import EvalRow, When
from services.supervisor import PartFailed

Answer = Callable[[WeightsAnnouncement, str], str | None]


def weights(step: int, epoch: int = 0) -> WeightsAnnouncement:
    version = PolicyVersion(epoch=epoch, step=step)
    return WeightsAnnouncement(version=version, kind="ema", digest="0" * 32, tensors=1, bytes=4)


def row_of(told: WeightsAnnouncement, when: str) -> str:
    row = {"time": 0.0, "when": when, "epoch": told.version.epoch, "step": told.version.step, "prompts": 4}
    return EvalRow.model_validate(row).model_dump_json()


class Stage:
    """A schedule in front of an evaluator that answers as `answer` says, once `ready`. No Ray."""

    def __init__(self, *overrides: str, evaluated: Sequence[tuple[int, When]] = ()) -> None:
        self.answer: Answer = row_of
        self.ready = True
        self.ordered: list[tuple[str, str]] = []
        self.rows: list[tuple[str, int]] = []
        self.gone: list[tuple[str, When]] = []
        self.now = 0.0
        config = load_config("quickstart", ["learner.max_steps=100", *overrides])
        self.schedule = EvaluationSchedule(
            config,
            SimpleNamespace(evaluate=SimpleNamespace(remote=self._evaluate)),
            evaluated,
            on_row=lambda row: self.rows.append((row.when, row.step)),
            on_gone=lambda told, when: self.gone.append((str(told.version), when)),
        )

    def _evaluate(self, announcement: str, when: str) -> tuple[WeightsAnnouncement, str]:
        told = WeightsAnnouncement.model_validate_json(announcement)
        self.ordered.append((str(told.version), when))
        return told, when

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        self.now += timeout
        return (references, []) if self.ready else ([], references)

    def get(self, reference: tuple[WeightsAnnouncement, str]) -> str | None:
        return self.answer(*reference)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def polls(self, *announced: WeightsAnnouncement | None) -> None:
        """Each announcement is the newest for three turns."""
        for each in announced:
            for _ in range(3):
                self.schedule.poll(each)


@pytest.fixture
def stage_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stage]]:
    def make(*overrides: str, evaluated: Sequence[tuple[int, When]] = ()) -> Stage:
        stage = Stage(*overrides, evaluated=evaluated)
        fake_ray = SimpleNamespace(wait=stage.wait, get=stage.get, exceptions=ray.exceptions)
        fake_time = SimpleNamespace(monotonic=lambda: stage.now, sleep=stage.sleep)
        monkeypatch.setattr(evaluation_schedule, "ray", fake_ray)
        monkeypatch.setattr(evaluation_schedule, "time", fake_time)
        return stage

    return make


def test_each_step_that_is_due_is_evaluated_once(stage_of: Callable[..., Stage]) -> None:
    stage = stage_of("eval.every_steps=20")
    stage.polls(
        None, weights(0), weights(20), weights(40, epoch=1), weights(40, epoch=2), weights(100, epoch=2)
    )
    stage.schedule.finish(weights(100, epoch=2), lambda: "")
    assert stage.rows == [("before", 0), ("during", 20), ("during", 40), ("after", 100)]


def test_what_an_earlier_driver_has_evaluated_is_not_evaluated_again(stage_of: Callable[..., Stage]) -> None:
    stage = stage_of("eval.every_steps=20", evaluated=[(0, "before"), (20, "during")])
    stage.polls(weights(0, epoch=1), weights(20, epoch=1), weights(40, epoch=1))
    assert stage.rows == [("during", 40)]


def test_a_run_that_is_to_end_where_it_was_evaluated_is_evaluated_after_training(
    stage_of: Callable[..., Stage],
) -> None:
    """`learner.max_steps` was lowered; the evaluation during training had fewer prompts."""
    stage = stage_of("eval.every_steps=20", evaluated=[(0, "before"), (100, "during")])
    stage.schedule.finish(weights(100, epoch=1), lambda: "")
    assert stage.rows == [("after", 100)]


def test_where_a_shorter_run_had_ended_is_not_evaluated_again(stage_of: Callable[..., Stage]) -> None:
    stage = stage_of("eval.every_steps=20", evaluated=[(0, "before"), (40, "after")])
    stage.polls(weights(40, epoch=1), weights(60, epoch=1))
    assert stage.rows == [("during", 60)]


@pytest.mark.parametrize(("every", "step"), [(0, 10), (0, 20), (20, 10)])
def test_the_weights_a_resumed_learner_begins_with_are_evaluated_only_if_due(
    stage_of: Callable[..., Stage], every: int, step: int
) -> None:
    stage = stage_of(f"eval.every_steps={every}", evaluated=[(0, "before")])
    stage.polls(weights(step, epoch=1), weights(100, epoch=1))
    assert stage.ordered == [("1.100", "after")]


def test_an_evaluator_that_is_behind_skips(stage_of: Callable[..., Stage]) -> None:
    stage = stage_of("eval.every_steps=20")
    stage.ready = False
    stage.polls(weights(0), weights(20), weights(40))
    assert stage.ordered == [("0.0", "before")]
    stage.ready = True
    stage.polls(weights(60))
    assert stage.ordered[1:] == [("0.60", "during")]


def test_a_learner_that_dies_before_its_first_weights_are_installed_costs_no_evaluation(
    stage_of: Callable[..., Stage],
) -> None:
    stage = stage_of()
    stage.answer = lambda told, when: None if told.version.epoch == 0 else row_of(told, when)
    stage.polls(weights(0, epoch=0))
    assert stage.ordered == [("0.0", "before")], "asked for again when there is something new"
    assert stage.gone == [("0.0", "before")]
    stage.polls(weights(0, epoch=1))
    assert stage.rows == [("before", 0)]


def test_final_weights_that_nobody_has_fail_the_run_within_the_deadline(
    stage_of: Callable[..., Stage],
) -> None:
    stage = stage_of("eval.deadline_s=60")
    stage.answer = lambda told, when: None
    with pytest.raises(PartFailed, match=r"within 60 s \(eval.deadline_s\): .* the weights 3.100"):
        stage.schedule.finish(weights(100, epoch=3), lambda: "waiting")
    assert 1 < len(stage.ordered) < 15
    assert stage.gone == [("3.100", "after")]


def test_final_weights_that_come_late_are_evaluated(stage_of: Callable[..., Stage]) -> None:
    stage = stage_of()
    stage.answer = lambda told, when: row_of(told, when) if stage.now > 20 else None
    stage.schedule.finish(weights(100), lambda: "waiting")
    assert stage.rows == [("after", 100)]


def test_an_evaluator_that_does_not_end_is_named_with_what_it_does(stage_of: Callable[..., Stage]) -> None:
    stage = stage_of("eval.deadline_s=60")
    stage.ready = False
    with pytest.raises(PartFailed, match=r"step 100 did not end within 60 s .*: stuck in a scorer"):
        stage.schedule.finish(weights(100), lambda: "stuck in a scorer")


def test_an_evaluator_that_dies_ends_the_run(stage_of: Callable[..., Stage]) -> None:
    stage = stage_of()

    def die(told: WeightsAnnouncement, when: str) -> str:
        raise ray.exceptions.RayActorError

    stage.answer = die
    with pytest.raises(PartFailed, match="the evaluator failed: "):
        stage.polls(weights(0))


def test_without_held_out_prompts_there_is_no_evaluation(
    stage_of: Callable[..., Stage], tmp_path: Any
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n")
    stage = stage_of("prompts.source=file", f"prompts.path={file}")
    assert not stage.schedule.possible
    stage.polls(weights(0))
    assert stage.ordered == []
