"""Trackers beside metrics.jsonl, with the real libraries where they are there; nothing is sent anywhere."""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from services.config import Config
from services.config_file import ConfigError, load_config
from services.doctor import examine
from services.metrics import Estimate, EvalRow, EventRow, Spread, UpdateRow
from services.preflight import refuse_unusable
from services.run_directory import RunDirectory
from services.telemetry import Telemetry, read_metrics
from services.trackers import TrackerSink, tracker_sinks
from tests.ports import free_ports

SECRET = "a-password-for-tests-only"


def update(step: int) -> UpdateRow:
    return UpdateRow(
        time=100.0 + step,
        epoch=0,
        step=step,
        max_steps=4,
        seconds=2.0,
        reward_mean=step / 8,
        reward_std=0.1,
        rewards={"ocr": Spread(mean=0.5, std=0.1)},
        kl=None,
    )


HELD_OUT = EvalRow(
    time=101.0, epoch=0, step=0, when="before", prompts=4, rewards={"ocr": Estimate(mean=0.25)}
)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(load_config("quickstart", [f"run.directory={tmp_path}/runs"]))


def config(*names: str) -> Config:
    return load_config("quickstart", [f"telemetry.tracker=[{', '.join(names)}]"])


def train(run: RunDirectory, tracker: str, steps: range) -> None:
    """What the driver does with rows; held-out scores come later than the updates that follow them."""
    with tracker_sinks(config(tracker), run) as sinks, Telemetry(run.root, beside=sinks) as telemetry:
        for step in steps:
            telemetry.write(update(step))
        if 1 in steps:
            telemetry.write(HELD_OUT)
            telemetry.event("worker died")


def test_mlflow_has_the_curves_and_a_resumed_run_goes_on(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = pytest.importorskip("mlflow")
    store = f"file:{tmp_path}/store"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    # The store of files needs no database; MLflow wants to be asked for it.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    train(run, "mlflow", range(1, 3))
    train(run, "mlflow", range(3, 5))
    assert not caplog.records
    client = mlflow.MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("dgpo")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == (run.name, "FINISHED")
    assert found.data.params["learner.groups_per_step"] == "8"
    history = client.get_metric_history(found.info.run_id, "train/reward_mean")
    assert [(one.step, one.value) for one in history] == [(step, step / 8) for step in range(1, 5)]
    (held_out,) = client.get_metric_history(found.info.run_id, "eval/ocr")
    assert (held_out.step, held_out.value) == (0, 0.25)
    assert "train/kl" not in found.data.metrics, "what is null is left out"


def test_wandb_offline_writes_into_the_run_directory(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(run, "wandb", range(1, 3))
    train(run, "wandb", range(3, 5))
    assert not caplog.records
    written = sorted((run.root / "wandb").glob(f"offline-run-*/run-{run.name}.wandb"))
    assert len(written) == 2, "one for each life of the driver; `wandb sync` makes one run of them"
    first, second = written
    # A process of the library writes it, and has not always ended with the run.
    for name in (b"train/reward_mean", b"eval/ocr", b"learner.groups_per_step", b"quickstart"):
        _until_written(first, name)
    _until_written(second, b"train/reward_mean")


def _until_written(file: Path, what: bytes) -> None:
    give_up = time.monotonic() + 60
    while what not in file.read_bytes():
        assert time.monotonic() < give_up, file.read_bytes()
        time.sleep(0.05)


def test_trackio_has_the_curves_and_a_resumed_run_goes_on(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio wants an older pillow than constraints.txt has")
    train(run, "trackio", range(1, 3))
    train(run, "trackio", range(3, 5))
    assert not caplog.records
    (found,) = trackio.Api().runs("dgpo")
    assert found.name == run.name
    logs = trackio.sqlite_storage.SQLiteStorage.get_logs("dgpo", run.name)
    rewards = {one["step"]: one["train/reward_mean"] for one in logs if "train/reward_mean" in one}
    assert rewards == {step: step / 8 for step in range(1, 5)}


def test_a_tracker_whose_server_is_gone_costs_one_warning(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow")
    (port,) = free_ports(1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    train(run, "mlflow", range(1, 4))
    (told,) = [record for record in caplog.records if record.name == "services.trackers"]
    assert told.levelno == logging.WARNING
    assert "tracker mlflow: " in told.message and "the run goes on" in told.message
    assert len(read_metrics(run.root).updates) == 3


def test_wandb_asks_nobody_for_a_key(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    train(run, "wandb", range(1, 2))
    (told,) = [record for record in caplog.records if record.name == "services.trackers"]
    assert "WANDB_MODE=offline" in told.message


class Recording:
    """A tracker whose disk is full for a while."""

    def __init__(self, fails: tuple[int, ...]) -> None:
        self.steps: list[int] = []
        self.ended: bool | None = None
        self._fails = fails

    def log(self, numbers: Mapping[str, float], step: int, time: float) -> None:
        if step in self._fails:
            raise OSError("no space left")
        self.steps.append(step)

    def finish(self, *, failed: bool) -> None:
        self.ended = failed


def test_a_row_that_is_refused_costs_that_row_and_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Recording(fails=(1, 2))
    sink = TrackerSink("demo", lambda: tracker)
    for step in range(5):
        sink.add(update(step))
    sink.add(EventRow(time=1.0, what="worker died"))
    sink.close(failed=True)
    assert (tracker.steps, tracker.ended) == ([0, 3, 4], True)
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "tracker demo: OSError: no space left"
    ]


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    released = threading.Event()
    yield released
    released.set()


def test_a_tracker_that_hangs_does_not_hold_the_run(
    hanging: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("services.trackers.CLOSE_S", 0.05)

    def open_() -> Recording:
        hanging.wait()
        return Recording(())

    sink = TrackerSink("demo", open_)
    sink.add(update(1))
    sink.close(failed=False)
    assert ["has not taken everything" in record.message for record in caplog.records] == [True]


def test_a_package_that_is_missing_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> object:
        return None if name in ("wandb", "sqlalchemy") else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"tracker wandb: .* pip install 'dgpo-cluster\[wandb\]'"):
        refuse_unusable(config("wandb"))
    (finding,) = [one for one in examine(config("wandb")) if one.what == "tracker wandb"]
    assert not finding.ok and finding.remedy.startswith("pip install 'dgpo-cluster[wandb]', or leave it out")
    if found("mlflow") is not None:
        with pytest.raises(ConfigError, match="mlflow-skinny has no store of its own"):
            refuse_unusable(config("mlflow"))


def test_nothing_secret_is_in_the_configuration_that_is_logged(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, object] = {}

    def open_tracker(name: str, run: RunDirectory, group: str, facts: Mapping[str, object]) -> Recording:
        told.update(facts)
        return Recording(())

    monkeypatch.setenv("DGPO_QUEUE_PASSWORD", SECRET)
    monkeypatch.setattr("services.tracker_libraries.open_tracker", open_tracker)
    settings = load_config(
        "quickstart",
        [
            "queue.url=redis://run@queue.example:6380/0",
            "queue.password_env=DGPO_QUEUE_PASSWORD",
            f"rewards=[{{name: ocr, url: 'https://rewards.example/ocr?key={SECRET}'}}]",
            "telemetry.tracker=wandb",
        ],
    )
    with tracker_sinks(settings, run):
        pass
    assert told["queue.url"] == "redis://queue.example:6380/0"
    assert told["rewards.0.url"] == "https://rewards.example/ocr"
    assert SECRET not in repr(told)


def test_without_a_tracker_no_library_is_imported(run: RunDirectory) -> None:
    before = set(sys.modules)
    with tracker_sinks(load_config("quickstart"), run) as sinks:
        assert sinks == []
    assert not {"wandb", "mlflow", "trackio"} & (set(sys.modules) - before)
