"""Whole runs on real Ray, Valkey, Ray Train and reward servers, of which nothing dies.

At `max_staleness: 0` the weights are a pure function of configuration and seed, so the digest of one run is
what every other is held against. Runs that lose their parts are in test_training_faults.py.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from rich.console import Console
from small_runs import STEPS, TOKEN_VARIABLE, Heard, Watching, run

from learner.checkpoint import newest_checkpoint
from reward_servers.app import create_app
from reward_servers.local import LocalServer
from reward_servers.scorer import ItemScore, Scorer
from reward_servers.server_config import ServerConfig
from reward_servers.wire import ScoreCall
from services.config import Config
from services.config_file import ConfigError
from services.driver import train
from services.messages import Heartbeat
from services.metrics import EvalRow, UpdateRow
from services.run_directory import RunDirectory
from services.status import run_status, scale_run
from services.telemetry import read_metrics
from services.train import run_training

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(600)]


@pytest.mark.slow
def test_the_weights_do_not_depend_on_the_number_of_workers_nor_on_their_way_to_them(
    recipe: Callable[..., Config], digest: str
) -> None:
    # Without the velocity probe: it must not matter either.
    outcome = run(
        recipe("rollout.workers=3", "learner.probe_every=0", "learner.publish_through=process_groups")
    )
    assert outcome.weights_digest == digest
    metrics = read_metrics(outcome.run.root)
    assert [row.step for row in metrics.updates] == list(range(1, STEPS + 1))
    assert {row.staleness_max for row in metrics.updates} == {0}
    assert {row.when for row in metrics.evals} == {"before", "after"}


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_and_larger_steps(recipe: Callable[..., Config]) -> None:
    directory = RunDirectory.create(recipe("rollout.workers=2", "learner.max_steps=1"))
    screen = Console(stderr=True, quiet=True)
    first = run_training(directory.config(), directory, resume=False, screen=screen)
    further = directory.config(("learner.max_steps=3", "learner.groups_per_step=3"))
    second = run_training(further, directory, resume=True, screen=screen)
    assert (first["steps"], first["groups"]) == (1, 2)
    assert (second["steps"], second["groups"]) == (3, 2 + 2 * 3)
    assert RunDirectory.open(directory.root).config() == further
    card = (directory.root / "export" / "pipeline" / "README.md").read_text()
    assert "| updates | 3 of 3 |\n" in card
    assert "after 3 updates |\n" in card


def test_staleness_is_bounded_and_used_and_metrics_are_told(
    recipe: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Weights go straight from the learner to the workers."""
    monkeypatch.setattr("services.driver.RunMetrics", Heard)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings = (
        "queue.max_staleness=1",
        "rollout.workers=2",
        "learner.max_steps=6",
        "telemetry.tracker=mlflow",
    )
    titles: set[str] = set()

    def look(beats: list[Heartbeat]) -> None:
        for beat in beats:
            with suppress(psutil.Error, IndexError):
                titles.add(psutil.Process(beat.pid).cmdline()[0])

    view = Watching(at_beats=look)
    outcome = run(recipe(*settings, "learner.publish_through=process_groups"), view)
    shown = {title.removeprefix("ray::").partition(": ")[0] for title in titles if ": " in title}
    assert shown >= {"learner-0", "rollout-0", "rollout-1", "evaluator"}, "Ray's dashboard shows titles"
    assert not any(character.isdigit() for title in titles for character in title.partition(": ")[2])
    written = read_metrics(outcome.run.root)
    assert max(row.staleness_max for row in written.updates) == 1
    for row in written.updates:
        lags = [lag for lag, groups in enumerate(row.staleness) for _ in range(groups)]
        assert (len(lags), max(lags)) == (len(row.ordinals), row.staleness_max)
    told = [row for row in Heard.last.rows if isinstance(row, UpdateRow | EvalRow)]
    assert sorted(told, key=lambda row: row.time) == sorted(
        [*written.updates, *written.evals], key=lambda row: row.time
    )
    client = MlflowClient(f"file:{tmp_path}/store")
    (tracked,) = client.search_runs([client.get_experiment_by_name("dgpo").experiment_id])
    assert (tracked.info.run_name, tracked.info.status) == (outcome.run.name, "FINISHED")
    rewards = client.get_metric_history(tracked.info.run_id, "train/reward_mean")
    assert {one.step: one.value for one in rewards} == {row.step: row.reward_mean for row in written.updates}
    held_out = client.get_metric_history(tracked.info.run_id, "eval/ocr")
    assert {one.step: one.value for one in held_out} == {
        row.step: row.rewards["ocr"].mean for row in written.evals
    }
    # A busy machine may silence a part for a while.
    assert Heard.last.states[0] == "starting"
    assert set(Heard.last.states[1:]) - {"degraded"} == {"running"}
    assert Heard.last.parts >= {"learner-0", "rollout-0", "rollout-1", "evaluator"}


@pytest.mark.slow
def test_workers_are_made_and_taken_away_while_the_run_goes_on(recipe: Callable[..., Config]) -> None:
    config = recipe("rollout.workers=1", "learner.max_steps=400")
    directory = RunDirectory.create(config)
    wanted, stopped = [3, 1], threading.Event()

    def left() -> list[str]:
        return [row.detail for row in read_metrics(directory.root).events if row.what == "worker left"]

    def follow(beats: list[Heartbeat]) -> None:
        parts = {beat.part for beat in beats if beat.part.startswith("rollout-")}
        if wanted == [3, 1] and parts == {"rollout-0"}:
            scale_run(directory, wanted.pop(0))
        elif wanted == [1] and parts == {"rollout-0", "rollout-1", "rollout-2"}:
            assert run_status(directory).workers_wanted == 3
            scale_run(directory, wanted.pop(0))
        elif not wanted and len(left()) == 2 and parts == {"rollout-0"} and not stopped.is_set():
            stopped.set()  # a second signal would end this process
            os.kill(os.getpid(), signal.SIGINT)

    outcome = train(config, directory, Watching(at_beats=follow))
    assert outcome.interrupted and wanted == []
    assert sorted(left()) == ["rollout-1", "rollout-2"]
    written = read_metrics(directory.root)
    assert [row.step for row in written.updates] == list(range(1, outcome.version.step + 1))
    assert [row.what for row in written.events if row.level != "info"] == []


class Drifting(Scorer):
    """Every image scores more, or less, than the one before: a reward that is gamed, and what sees it."""

    name, version, model = "drifting", "1", "a count of images"
    batch_invariant, max_batch = True, 64

    def __init__(self, drift: float) -> None:
        self._drift, self._images = drift, 0

    def score(self, call: ScoreCall) -> Sequence[ItemScore]:
        first = self._images
        self._images += len(call.images)
        return [ItemScore(self._drift * number) for number in range(first, self._images)]

    def warm_up(self) -> None: ...


@pytest.mark.slow
def test_the_guard_stops_a_run_whose_reward_is_gamed(recipe: Callable[..., Config]) -> None:
    config = ServerConfig(app="drifting", token_env=TOKEN_VARIABLE)
    with (
        LocalServer(create_app(config, scorer=Drifting(0.1))) as gamed,
        LocalServer(create_app(config, scorer=Drifting(-0.1))) as independent,
    ):
        watched = [
            f"{{name: gamed, url: '{gamed.url}', token_env: {TOKEN_VARIABLE}}}",
            f"{{name: watched, url: '{independent.url}', token_env: {TOKEN_VARIABLE}, heldout: true}}",
        ]
        settings = [
            f"rewards=[{', '.join(watched)}]",
            *("guard.drop={watched: 0.5}", "guard.window=1", "guard.action=stop", "learner.max_steps=50"),
        ]
        directory = RunDirectory.create(recipe(*settings))
        screen = Console(stderr=True, quiet=True)
        result = run_training(directory.config(), directory, resume=False, screen=screen)
    assert result["interrupted"]
    assert "held-out reward 'watched' fell" in result["guard"]
    assert result["steps"] < 50
    found = newest_checkpoint(directory.root)
    assert found is not None
    assert found.step == result["steps"]
    assert "guard fired" in {event.what for event in read_metrics(directory.root).events}


def test_two_drivers_on_one_directory_are_refused(recipe: Callable[..., Config]) -> None:
    config = recipe()
    directory = RunDirectory.create(config)
    holder = RunDirectory(directory.root)
    with holder.locked(), pytest.raises(ConfigError, match="another driver"):
        train(config, directory, Watching())
