"""metrics.jsonl, TensorBoard events and log lines: what a run leaves behind must survive its crashes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from services.logs import configure_logging
from services.metrics import Estimate, EvalRow, MemoryRow, Spread, UpdateRow, parse_row
from services.telemetry import METRICS_FILE, Metrics, Telemetry, read_metrics


def update(step: int, *, epoch: int = 0, reward: float = 0.5) -> UpdateRow:
    return UpdateRow(
        time=100.0 + step,
        epoch=epoch,
        step=step,
        max_steps=10,
        seconds=2.0,
        reward_mean=reward,
        reward_std=0.1,
        rewards={"ocr": Spread(mean=reward, std=0.1)},
        phases={"wait_s": 0.5},
    )


def evaluation(step: int, when: str, *, epoch: int = 0, score: float = 0.5) -> EvalRow:
    rewards = {"ocr": Estimate(mean=score, se=0.01)}
    return EvalRow.model_validate(
        {"time": 1.0, "when": when, "epoch": epoch, "step": step, "prompts": 8, "rewards": rewards}
    )


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    with Telemetry(tmp_path, tensorboard=False) as telemetry:
        telemetry.write(update(1))
        telemetry.write(evaluation(0, "before"))
        telemetry.event("dead letter", 'reward "ocr" gave up', level="warning", ordinal=7)
        telemetry.write(MemoryRow(time=3.0, parts={"learner-0": 123}))
    metrics = read_metrics(tmp_path)
    assert metrics.updates == (update(1),)
    assert metrics.evaluation("before") == evaluation(0, "before")
    assert metrics.evaluation("after") is None
    assert [(event.what, event.ordinal) for event in metrics.events] == [("dead letter", 7)]
    assert metrics.memory is not None
    assert metrics.memory.parts == {"learner-0": 123}


def test_an_evaluation_after_training_is_none_once_the_run_has_gone_on() -> None:
    ended = Metrics(updates=(update(1), update(2)), evals=(evaluation(0, "before"), evaluation(2, "after")))
    assert ended.evaluation("after") == ended.newest_evaluation == evaluation(2, "after")
    longer = replace(ended, updates=(*ended.updates, update(3)))
    assert longer.evaluation("after") is None
    assert longer.newest_evaluation == evaluation(2, "after")
    during = replace(longer, evals=(*ended.evals, evaluation(3, "during")))
    assert during.newest_evaluation == evaluation(3, "during")
    assert Metrics(evals=(evaluation(0, "before"),)).newest_evaluation is None


def test_a_row_is_readable_before_the_writer_closes(tmp_path: Path) -> None:
    with Telemetry(tmp_path, tensorboard=False) as telemetry:
        telemetry.write(update(1))
        assert len(read_metrics(tmp_path).updates) == 1


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    with Telemetry(tmp_path, tensorboard=False) as telemetry:
        telemetry.write(update(1))
        telemetry.write(update(2))
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes()[:-40])
    assert [row.step for row in read_metrics(tmp_path).updates] == [1]
    with Telemetry(tmp_path, tensorboard=False) as telemetry:
        telemetry.write(update(2, epoch=1))
    metrics = read_metrics(tmp_path)
    assert [(row.epoch, row.step) for row in metrics.updates] == [(0, 1), (1, 2)]
    assert metrics.unreadable == 1


def test_rows_that_a_resume_undid_are_left_out(tmp_path: Path) -> None:
    with Telemetry(tmp_path, tensorboard=False) as telemetry:
        telemetry.write(evaluation(0, "before"))
        for step in range(1, 7):
            telemetry.write(update(step))
        telemetry.write(evaluation(4, "during", score=0.6))
        telemetry.write(evaluation(6, "during", score=0.7))
        for step in (5, 6):
            telemetry.write(update(step, epoch=1))
        telemetry.write(update(6, epoch=2))
    metrics = read_metrics(tmp_path)
    assert [(row.step, row.epoch) for row in metrics.updates] == [
        (1, 0),
        (2, 0),
        (3, 0),
        (4, 0),
        (5, 1),
        (6, 2),
    ]
    assert [row.step for row in metrics.evals] == [0, 4]


def test_updates_past_the_resumed_step_do_not_survive_an_unfinished_epoch(tmp_path: Path) -> None:
    """The later epoch got less far than the earlier one: the earlier one's surplus is undone all the same."""
    with Telemetry(tmp_path, tensorboard=False) as telemetry:
        for step in range(1, 9):
            telemetry.write(update(step))
        telemetry.write(update(5, epoch=1))
    assert [row.step for row in read_metrics(tmp_path).updates] == [1, 2, 3, 4, 5]


def test_a_run_that_wrote_nothing_reads_as_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path).updates == ()


@given(value=st.floats(allow_nan=True, allow_infinity=True))
def test_every_number_gives_valid_json(value: float) -> None:
    row = update(1).model_copy(update={})
    row = UpdateRow.model_validate({**row.model_dump(), "loss": value, "grad_norm": value})
    line = row.model_dump_json()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = parse_row(line)
    assert isinstance(back, UpdateRow)
    assert back.loss == (value if math.isfinite(value) else None)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="reward_maen"):
        UpdateRow.model_validate({**update(1).model_dump(), "reward_maen": 1.0})


def test_tensorboard_shows_one_curve_where_a_run_went_back(tmp_path: Path) -> None:
    """By a resume, and by a learner that was started again while the driver went on."""
    with Telemetry(tmp_path) as telemetry:
        for step in range(1, 6):
            telemetry.write(update(step, reward=0.1 * step))
    first = next((tmp_path / "tensorboard").iterdir())
    first.rename(first.with_name("events.out.tfevents.0000000001.first"))
    with Telemetry(tmp_path) as telemetry:
        for step in (4, 5):
            telemetry.write(update(step, epoch=1, reward=0.7))
        telemetry.write(update(4, epoch=2, reward=0.9))
        telemetry.write(evaluation(4, "during", score=0.8))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    curve = [(point.step, round(point.value, 3)) for point in events.Scalars("train/reward_mean")]
    assert curve == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.9)]
    assert events.Scalars("eval/ocr")[0].value == pytest.approx(0.8)
    assert "train/loss" not in events.Tags()["scalars"]


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


@pytest.mark.usefixtures("restored_logging")
def test_a_record_is_one_line_with_its_fields(tmp_path: Path) -> None:
    configure_logging("rollout-0", tmp_path, run="demo", stream_level=None)
    log = logging.getLogger("services.test")
    log.info("two\nlines", extra={"step": 3, "version": "0.12", "ordinal": 97})
    try:
        raise ValueError("broken\nbadly")
    except ValueError:
        log.exception("failed")
    lines = (tmp_path / "logs" / "rollout-0.log").read_text().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("two run=demo step=3 version=0.12 ordinal=97 worker=rollout-0\\nlines")
    assert "ERROR" in lines[1]
    assert "ValueError: broken\\nbadly" in lines[1]
    assert "ordinal" not in lines[1]


@pytest.mark.usefixtures("restored_logging")
def test_configuring_again_does_not_double_the_lines(tmp_path: Path) -> None:
    for _ in range(2):
        configure_logging("driver", tmp_path, stream_level=None)
    logging.getLogger("services.test").info("once")
    assert (tmp_path / "logs" / "driver.log").read_text().count("once") == 1
