"""A curriculum on real Ray, Valkey and reward servers: what it decides survives what happens in between."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from queue_support import Run, version
from small_runs import SMALL, TOKEN_VARIABLE, Watching

from reward_servers.app import create_app
from reward_servers.local import LocalServer
from reward_servers.scorer import ItemScore, Scorer
from reward_servers.server_config import ServerConfig
from reward_servers.wire import ScoreCall
from services.config import Config
from services.config_file import load_config
from services.driver import train
from services.embedded import EmbeddedValkey
from services.group_queue import Fenced, NotAssigned
from services.messages import Heartbeat
from services.metrics import UpdateRow
from services.monitor import Outcome
from services.recording import Recording
from services.run_directory import RunDirectory
from services.telemetry import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

STEPS = 6


class Brightness(Scorer):
    """How bright an image is; prompts that say `never` are never solved."""

    name, version, model = "brightness", "1", "the mean of the pixels"
    batch_invariant, max_batch = True, 64

    def score(self, call: ScoreCall) -> Sequence[ItemScore]:
        return [
            ItemScore(0.0 if "never" in prompt else float(image.mean()) / 255)
            for image, prompt in zip(call.images, call.prompts, strict=True)
        ]

    def warm_up(self) -> None: ...


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    config = ServerConfig(app="brightness", token_env=TOKEN_VARIABLE)
    with LocalServer(create_app(config, scorer=Brightness())) as running:
        yield running.url


@pytest.fixture
def recipe(tmp_path: Path, server: str) -> Callable[..., Config]:
    file = tmp_path / "prompts.txt"
    file.write_text("a sign\na door\nnever one\nnever two\n")

    def make(*overrides: str) -> Config:
        return load_config(
            "quickstart",
            [
                f"run.directory={tmp_path}",
                *SMALL,
                f"prompts={{source: file, path: {file}, curriculum: {{after: 1, revisit: 0.2}}}}",
                "learner.groups_per_step=2",
                f"learner.max_steps={STEPS}",
                "queue.max_dead=1",
                "telemetry.record=true",
                f"rewards=[{{name: bright, url: '{server}', token_env: {TOKEN_VARIABLE}}}]",
                *overrides,
            ],
        )

    return make


def prompts_of(run: RunDirectory) -> list[str]:
    recording = Recording.open(run.groups)
    return [recording.header(place).prompt.text for place in range(len(recording))]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Outcome]:
    return {}


@pytest.fixture
def first(recipe: Callable[..., Config], undisturbed: dict[str, Outcome]) -> Outcome:
    if not undisturbed:
        config = recipe("rollout.workers=1")
        undisturbed["first"] = train(config, RunDirectory.create(config), Watching())
    return undisturbed["first"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_what_is_never_solved_is_left_out(first: Outcome) -> None:
    prompts = prompts_of(first.run)
    assert len(prompts) == 2 * STEPS
    # The first pass is assigned before anything is known of it; behind it come the others far more often.
    assert sorted(prompts[:4]) == ["a door", "a sign", "never one", "never two"]
    assert sum("never" in prompt for prompt in prompts[5:]) <= 2
    assert sum(row.prompts_left_out for row in read_metrics(first.run.root).updates) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_an_interrupted_run_goes_on_with_the_same_prompts_to_the_same_weights(
    recipe: Callable[..., Config], first: Outcome
) -> None:
    config = recipe("rollout.workers=3")
    directory = RunDirectory.create(config)

    def interrupt(row: UpdateRow) -> None:
        if row.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = train(config, directory, Watching(at_row=interrupt))
    assert stopped.interrupted
    outcome = train(directory.config(), directory, Watching(), resume=True)
    assert outcome.weights_digest == first.weights_digest
    assert prompts_of(directory) == prompts_of(first.run)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_killed_learner_decides_again_as_it_did(recipe: Callable[..., Config], first: Outcome) -> None:
    pids: list[int] = []
    killed: list[int] = []

    def remember(beats: list[Heartbeat]) -> None:
        pids[:] = [beat.pid for beat in beats if beat.part == "learner-0"]

    def kill(row: UpdateRow) -> None:
        if row.step == 3 and not killed and pids:
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)

    config = recipe("learner.max_restarts=2")
    directory = RunDirectory.create(config)
    outcome = train(config, directory, Watching(at_row=kill, at_beats=remember))
    assert killed
    assert outcome.weights_digest == first.weights_digest
    assert prompts_of(directory) == prompts_of(first.run)


@pytest.fixture
def run(valkey: EmbeddedValkey, run_name: str) -> Run:
    return Run(valkey, run_name)


def test_a_worker_takes_the_place_that_the_learner_of_its_epoch_has_assigned(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.queue_worker.PLAN_WAIT_S", 0.1)
    run.begin()
    lease = run.worker.issue("worker")
    assert lease is not None
    with pytest.raises(NotAssigned, match="ordinal 0"):
        run.worker.place_of(lease)
    run.learner.plan({0: 4, 1: 7})
    assert run.worker.place_of(lease) == 4

    replaced, run.learner = run.learner, run.queue()
    run.begin()
    again = run.worker.issue("another")
    assert again is not None
    assert again.version == version(1, 0)
    with pytest.raises(NotAssigned, match=f"ordinal {again.ordinal} "):
        run.worker.place_of(again)
    with pytest.raises(Fenced):
        replaced.plan({0: 5, 1: 6})
    run.learner.plan({1: 9})
    assert run.worker.place_of(again) == 9
    with pytest.raises(NotAssigned, match="ordinal 0"):
        run.worker.place_of(lease)
