"""Recording and training from the recording, on real Ray, Valkey, Ray Train and a reward server.

At `max_staleness: 0` an offline run makes the updates that were recorded: it ends with the same weights, even
though the learner that recorded them was killed on the way.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from small_runs import SMALL, TOKEN_VARIABLE

from services.config import Config
from services.config_file import load_config
from services.driver import train
from services.messages import Heartbeat
from services.metrics import UpdateRow
from services.progress import Progress
from services.recording import Recording
from services.run_directory import RunDirectory
from services.telemetry import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(600)]

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def settings(folder: Path, ocr_url: str) -> list[str]:
    return [
        f"run.directory={folder}",
        *SMALL,
        "learner.groups_per_step=2",
        f"learner.max_steps={STEPS}",
        "eval.every_steps=0",
        "eval.final_prompts=4",
        f"rewards=[{{name: ocr, url: '{ocr_url}', token_env: {TOKEN_VARIABLE}}}]",
    ]


class KillsTheLearner(Progress):
    """A silent view that kills the learner behind a step, once: the checkpoint is one step older."""

    def __init__(self, at_step: int) -> None:
        super().__init__("test", STEPS, quiet=True)
        self._at_step, self._pids, self.killed = at_step, list[int](), 0

    def heartbeats(self, beats: list[Heartbeat]) -> None:  # type: ignore[override]
        self._pids = [beat.pid for beat in beats if beat.part == "learner-0"] or self._pids

    def update_row(self, row: UpdateRow) -> None:
        if row.step == self._at_step and not self.killed and self._pids:
            self.killed = self._pids[0]
            os.kill(self.killed, signal.SIGKILL)


@pytest.fixture(scope="module")
def live(settings: list[str], ray_local: None) -> tuple[Config, Path, str]:
    """A run that recorded, through the death of its learner: its configuration, directory and digest."""
    config = load_config("quickstart", [*settings, "telemetry.record=true"])
    view = KillsTheLearner(at_step=3)
    outcome = train(config, RunDirectory.create(config), view)
    assert view.killed
    assert outcome.version.epoch >= 1
    return config, outcome.run.root, outcome.weights_digest


@pytest.mark.slow
def test_an_offline_run_ends_with_the_weights_of_the_run_it_was_recorded_from(
    live: tuple[Config, Path, str], settings: list[str]
) -> None:
    _, recorded, digest = live
    recording = Recording.open(recorded / "groups")
    assert [group.ordinal for group in recording.groups] == list(range(2 * STEPS))
    source = ["prompts.source=recorded", f"prompts.path={recorded / 'groups'}"]
    config = load_config("quickstart", [*settings, *source])
    outcome = train(config, RunDirectory.create(config), Progress("test", STEPS, quiet=True))
    assert outcome.weights_digest == digest
    logs = {path.name for path in (outcome.run.root / "logs").iterdir()}
    assert "feeder-0.log" in logs
    assert not any(name.startswith("rollout") for name in logs)
    before, after = read_metrics(recorded), read_metrics(outcome.run.root)
    assert [row.reward_mean for row in after.updates] == [row.reward_mean for row in before.updates]
    # The same held-out words, noise and weights.
    assert [row.rewards for row in after.evals] == [row.rewards for row in before.evals]
    assert [row.when for row in after.evals] == ["before", "after"]
