"""Whole runs that lose a part, or cannot go on: the same weights in the end, or an error that says why.

Most are slow: beside them there is the schedule of faults in tests/chaos.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from safetensors.torch import load_file, save_file
from small_runs import STEPS, Heard, Watching, run

from services.config import Config
from services.driver import train
from services.messages import Heartbeat
from services.metrics import UpdateRow
from services.queue_keeper import QueueKeeper
from services.run_directory import RunDirectory
from services.supervisor import PartFailed
from services.telemetry import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(600)]


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


@pytest.mark.slow
def test_a_killed_evaluator_is_made_anew(recipe: Callable[..., Config], digest: str) -> None:
    killed: list[int] = []

    def kill(beats: list[Heartbeat]) -> None:
        for beat in beats:
            if beat.part == "evaluator" and beat.state.startswith("evaluating") and not killed:
                killed.append(beat.pid)
                os.kill(beat.pid, signal.SIGKILL)

    # So many prompts that it is seen while it evaluates.
    settings = ("rollout.workers=1", "telemetry.heartbeat_s=0.05", "eval.final_prompts=300")
    outcome = run(recipe(*settings), Watching(at_beats=kill))
    assert killed and outcome.weights_digest == digest
    written = read_metrics(outcome.run.root)
    # The first evaluation is asked for again, unless training has come to its end meanwhile.
    assert [row.step for row in written.evals] in ([0, STEPS], [STEPS])
    assert "evaluator restarted" in [row.what for row in written.events]


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
