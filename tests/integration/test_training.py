"""Whole runs on real Ray, Valkey, Ray Train and reward servers: what must hold whatever happens in between.

At `max_staleness: 0` the weights are a pure function of configuration and seed, so the digest of an
undisturbed run is what every disturbed one is held against. Runs that lose their parts are slow here: beside
them there is the schedule of faults in tests/chaos.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_runs import SMALL, Watching

from learner.checkpoint import newest_checkpoint
from reward_servers.app import create_app
from reward_servers.local import LocalServer
from reward_servers.scorer import ItemScore, Scorer
from reward_servers.server_config import ServerConfig
from reward_servers.wire import ScoreCall
from services.config import Config
from services.config_file import ConfigError, load_config
from services.driver import train
from services.messages import Heartbeat, PolicyVersion
from services.metrics import AnyRow, EvalRow, UpdateRow
from services.monitor import Outcome
from services.progress import Progress
from services.queue_keeper import QueueKeeper
from services.queue_types import RunState
from services.ray_metrics import RunMetrics
from services.run_directory import RunDirectory
from services.status import run_status, scale_run
from services.supervisor import PartFailed
from services.telemetry import read_metrics
from services.train import run_training

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(600)]

STEPS = 4
TOKEN_VARIABLE = "DGPO_TEST_REWARD_TOKEN"


@pytest.fixture(scope="module")
def ocr_url() -> Iterator[str]:
    with LocalServer(create_app(ServerConfig(app="ocr", token_env=TOKEN_VARIABLE))) as server:
        yield server.url


@pytest.fixture
def recipe(tmp_path: Path, ocr_url: str) -> Callable[..., Config]:
    def make(*overrides: str) -> Config:
        return load_config(
            "quickstart",
            [
                f"run.directory={tmp_path}",
                *SMALL,
                "learner.groups_per_step=2",
                f"learner.max_steps={STEPS}",
                "eval.every_steps=0",
                "eval.final_prompts=4",
                f"rewards=[{{name: ocr, url: '{ocr_url}', token_env: {TOKEN_VARIABLE}}}]",
                *overrides,
            ],
        )

    return make


def run(config: Config, view: Progress | None = None) -> Outcome:
    return train(config, RunDirectory.create(config), view or Watching())


class Heard(RunMetrics):
    """What a run tells Ray's metrics."""

    last: Heard

    def __init__(self, run: str, rewards: Iterable[str] = ()) -> None:
        self.rows: list[AnyRow] = []
        self.states: list[str] = []
        self.parts: set[str] = set()
        Heard.last = self
        super().__init__(run, rewards)

    def add(self, row: AnyRow) -> None:
        self.rows.append(row)
        super().add(row)

    def state(self, state: RunState) -> None:
        self.states.append(state)
        super().state(state)

    def beats(self, alive: Iterable[Heartbeat], newest: PolicyVersion | None) -> None:
        beats = list(alive)
        self.parts |= {beat.part for beat in beats}
        super().beats(beats, newest)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, str]:
    """The digest of a run that nobody disturbed, once it is known."""
    return {}


@pytest.fixture
def digest(recipe: Callable[..., Config], undisturbed: dict[str, str]) -> str:
    if not undisturbed:
        undisturbed["digest"] = run(recipe("rollout.workers=1")).weights_digest
    return undisturbed["digest"]


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
def test_an_interrupted_run_goes_on_to_the_same_weights(recipe: Callable[..., Config], digest: str) -> None:
    config = recipe("rollout.workers=2", "learner.publish_through=shared_directory")
    directory = RunDirectory.create(config)

    def interrupt(row: UpdateRow) -> None:
        if row.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    first = train(config, directory, Watching(at_row=interrupt))
    assert first.interrupted
    assert 1 <= first.version.step < STEPS
    second = train(directory.config(), directory, Watching(), resume=True)
    assert not second.interrupted
    assert (second.version.epoch, second.version.step) == (1, STEPS)
    assert second.weights_digest == digest
    assert not (directory.root / "weights").exists(), "published weights outlive their publisher"
    written = [json.loads(line) for line in (directory.root / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written if row["kind"] == "update"] == list(range(1, STEPS + 1))


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
    assert "- step: 3\n" in card
    assert "held-out ocr" in card


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_nothing_is_lost(
    recipe: Callable[..., Config], digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.driver.RunMetrics", Heard)
    pids: list[int] = []

    def remember(beats: list[Heartbeat]) -> None:
        pids[:] = [beat.pid for beat in beats if beat.part == "rollout-0"]

    killed: list[int] = []

    def kill(row: UpdateRow) -> None:
        if row.step == 1 and not killed and pids:
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)

    # Nobody waits for the lease of the dead to run out.
    outcome = run(recipe("rollout.workers=1", "queue.lease_s=900"), Watching(at_row=kill, at_beats=remember))
    assert killed
    assert outcome.weights_digest == digest
    assert [e.what for e in read_metrics(outcome.run.root).events if e.what == "worker died"]
    at = Heard.last.states.index("degraded")
    assert "running" in Heard.last.states[at:], "the run stays degraded once all is well again"


def queue_server_of(directory: RunDirectory) -> psutil.Process:
    def ports(process: psutil.Process) -> set[int]:
        return {socket.laddr.port for socket in process.net_connections() if socket.status == "LISTEN"}

    port = urlsplit((directory.queue / "url").read_text().strip()).port
    (server,) = [child for child in psutil.Process().children() if port in ports(child)]
    return server


@pytest.mark.slow
@pytest.mark.parametrize("forgets", [False, True])
def test_a_killed_queue_server_is_started_again_and_nothing_is_lost(
    recipe: Callable[..., Config], digest: str, forgets: bool
) -> None:
    """Whether it has its file still, or has forgotten everything."""
    config = recipe("rollout.workers=1")
    directory = RunDirectory.create(config)
    killed: list[int] = []

    def kill(row: UpdateRow) -> None:
        if row.step == 2 and not killed:
            server = queue_server_of(directory)
            if forgets:
                server.suspend()
                shutil.rmtree(directory.queue / "appendonlydir")
            killed.append(server.pid)
            server.kill()

    outcome = train(config, directory, Watching(at_row=kill))
    assert killed
    assert outcome.weights_digest == digest
    written = read_metrics(directory.root)
    assert [row.what for row in written.events if "queue" in row.what] == ["queue server died"]
    assert {row.step for row in written.updates} == set(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_queue_server_that_keeps_dying_fails_the_run_with_its_name(
    recipe: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.driver.QueueKeeper", partial(QueueKeeper, max_restarts=0))
    config = recipe("rollout.workers=1")
    directory = RunDirectory.create(config)

    def kill(row: UpdateRow) -> None:
        if row.step == 1:
            queue_server_of(directory).kill()

    with pytest.raises(
        PartFailed, match=r"the queue server at 127.0.0.1:\d+ was lost: it has died too often"
    ):
        train(config, directory, Watching(at_row=kill))


@pytest.mark.slow
def test_a_killed_learner_goes_back_to_its_checkpoint(recipe: Callable[..., Config], digest: str) -> None:
    """With all that saves memory and changes nothing of what is computed."""
    pids: list[int] = []

    def remember(beats: list[Heartbeat]) -> None:
        pids[:] = [beat.pid for beat in beats if beat.part == "learner-0"]

    killed: list[int] = []

    def kill(row: UpdateRow) -> None:
        if row.step == 3 and not killed and pids:
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)

    saving = ("learner.gradient_checkpointing=true", "learner.micro_batch=auto", "model.text_encoders=cached")
    config = recipe("learner.max_restarts=2", *saving)
    outcome = run(config, Watching(at_row=kill, at_beats=remember))
    assert killed
    assert outcome.version.epoch >= 1
    assert outcome.weights_digest == digest
    assert {row.micro_batch for row in read_metrics(outcome.run.root).updates} == {4}
    assert json.loads((outcome.run.root / "micro_batch.json").read_text()) == {"micro_batch": 4}
    # A prompt an ordinal, and the held-out ones.
    assert len(list((config.run.directory / "conditions").rglob("*.safetensors"))) == STEPS * 2 + 4


def test_a_reward_that_is_down_fails_the_run_with_its_name(recipe: Callable[..., Config]) -> None:
    config = recipe(
        "rewards=[{name: ocr, url: 'http://127.0.0.1:9', deadline_s: 1}]",
        "queue.max_dead=0",
        "queue.max_attempts=1",
        "prompts.source=file",
        f"prompts.path={_prompts(recipe().run.directory)}",
    )
    with pytest.raises(PartFailed, match=r"ocr.*127\.0\.0\.1:9"):
        run(config)


def test_staleness_is_bounded_and_used_and_metrics_are_told(
    recipe: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.driver.RunMetrics", Heard)
    outcome = run(recipe("queue.max_staleness=1", "rollout.workers=2", "learner.max_steps=6"))
    written = read_metrics(outcome.run.root)
    assert max(row.staleness_max for row in written.updates) == 1
    told = [row for row in Heard.last.rows if isinstance(row, UpdateRow | EvalRow)]
    assert sorted(told, key=lambda row: row.time) == sorted(
        [*written.updates, *written.evals], key=lambda row: row.time
    )
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


@pytest.mark.slow
def test_a_worker_with_another_base_model_ends_the_run(recipe: Callable[..., Config], tmp_path: Path) -> None:
    """The node of a restarted worker has other frozen weights than the learner's had."""
    model = shutil.copytree("quickstart/model", tmp_path / "model")
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    config = recipe(
        *(f"model.path={model}", "model.train=lora", "model.lora.rank=4", "rollout.workers=1"),
        *("rollout.max_restarts=1", "queue.lease_s=900", f"prompts.path={_prompts(tmp_path)}"),
        *("prompts.source=file", "learner.max_steps=50"),
    )
    killed: list[int] = []

    def kill(row: UpdateRow) -> None:
        # Behind an update that tells that the worker had the learner's velocity.
        if row.probe_error != 0.0 or killed:
            return
        killed.append(view.pids["rollout-0"])
        changed = {name: tensor * 1.05 for name, tensor in load_file(weights).items()}
        # Beside it and moved there: the learner may still read the old file.
        save_file(changed, weights.with_suffix(".new"), metadata={"format": "pt"})
        weights.with_suffix(".new").replace(weights)
        os.kill(killed[0], signal.SIGKILL)

    view = Watching(at_row=kill)
    with pytest.raises(
        PartFailed, match=r"rollout-0 died 2 times .*VelocityDrift: weights policy 0\.\d+: the"
    ):
        run(config, view)
    assert killed


def _prompts(folder: Path) -> Path:
    file = folder / "prompts.txt"
    file.write_text('a sign that says "ABCD"\n')
    return file


def test_two_drivers_on_one_directory_are_refused(recipe: Callable[..., Config]) -> None:
    config = recipe()
    directory = RunDirectory.create(config)
    holder = RunDirectory(directory.root)
    with holder.locked(), pytest.raises(ConfigError, match="another driver"):
        train(config, directory, Watching())
