"""Runs whose learner has two ranks, on real Ray Train, Valkey and a reward server; one of them is killed.

At `max_staleness: 0` the weights are a pure function of configuration, seed and number of ranks, so an
undisturbed run is what every disturbed one is held against.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SMALL, TOKEN_VARIABLE, Watching
from torch import Tensor

from learner.checkpoint import newest_checkpoint
from learner.ray_train import LearnerFailed, fit
from services.config import Config
from services.config_file import load_config
from services.context import RunContext, SecretPlace
from services.driver import train
from services.embedded import EmbeddedValkey
from services.exporting import export_into
from services.metrics import UpdateRow
from services.monitor import Outcome
from services.recording import Recording
from services.run_directory import RunDirectory
from services.telemetry import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(900)]

STEPS, GROUPS = 4, 3
"""Three groups for two ranks: the shares of an update are never the same."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, ocr_url: str) -> Callable[..., Config]:
    folder = tmp_path_factory.mktemp("runs")
    # A file has no held-out prompts, so there is no evaluator to start.
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f'a sign that says "{word}"\n' for word in ("K7QX", "RED", "ON", "42", "HUT")))

    def make(*overrides: str) -> Config:
        return load_config(
            "quickstart",
            [
                f"run.directory={folder}",
                *SMALL,
                "rollout.workers=1",
                "learner.ranks=2",
                f"learner.groups_per_step={GROUPS}",
                f"learner.max_steps={STEPS}",
                "learner.compare_every=1",
                "eval.every_steps=0",
                "prompts.source=file",
                f"prompts.path={prompts}",
                "telemetry.record=true",
                f"rewards=[{{name: ocr, url: '{ocr_url}', token_env: {TOKEN_VARIABLE}}}]",
                *overrides,
            ],
        )

    return make


def weights(run: RunDirectory) -> dict[str, Tensor]:
    found = newest_checkpoint(run.root)
    assert found is not None
    assert found.step == STEPS
    return found.state["policy"]


def check_trained_once(run: RunDirectory) -> None:
    """Every ordinal, exactly once, in the lineage that survived."""
    found = newest_checkpoint(run.root)
    assert found is not None
    assert found.manifest["frontier"] == {"below": STEPS * GROUPS, "above": [], "dead": []}
    trained = [group.ordinal for group in Recording.open(run.root / "groups").groups]
    assert trained == list(range(STEPS * GROUPS))
    assert [row.step for row in read_metrics(run.root).updates] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def undisturbed(recipe: Callable[..., Config], ray_local: None) -> tuple[Outcome, dict[str, int]]:
    config, view = recipe(), Watching()
    return train(config, RunDirectory.create(config), view), view.pids


@pytest.mark.slow
def test_two_ranks_train_what_one_trains(
    undisturbed: tuple[Outcome, dict[str, int]], recipe: Callable[..., Config]
) -> None:
    outcome, pids = undisturbed
    check_trained_once(outcome.run)
    assert pids["learner-0"] != pids["learner-1"]
    rows = read_metrics(outcome.run.root).updates
    assert all(row.update["ranks_s"] > 0 for row in rows)
    logs = outcome.run.root / "logs"
    assert "starts at step 0" in (logs / "learner-0.log").read_text()
    assert "WARNING" not in (logs / "learner-1.log").read_text()
    single = recipe("learner.ranks=1")
    alone = train(single, RunDirectory.create(single), Watching())
    for ours, theirs in zip(rows, read_metrics(alone.run.root).updates, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.reward_mean == theirs.reward_mean
        assert ours.zero_variance_groups == theirs.zero_variance_groups
    expected = weights(alone.run)
    for name, tensor in weights(outcome.run).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_rank_is_started_again_and_nothing_is_lost_or_repeated(
    rank: int, undisturbed: tuple[Outcome, dict[str, int]], recipe: Callable[..., Config]
) -> None:
    killed: list[int] = []

    def kill(row: UpdateRow) -> None:
        if row.step == 3 and not killed:
            killed.append(view.pids[f"learner-{rank}"])
            os.kill(killed[0], signal.SIGKILL)

    # Checkpoints are written behind the training in one of the two.
    view, config = Watching(at_row=kill), recipe(f"checkpoint.asynchronous={str(rank == 0).lower()}")
    outcome = train(config, RunDirectory.create(config), view)
    assert killed
    assert view.pids[f"learner-{rank}"] != killed[0]
    assert outcome.version.epoch >= 1
    assert outcome.weights_digest == undisturbed[0].weights_digest
    check_trained_once(outcome.run)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 1])
def test_an_interrupted_run_drains_and_goes_on_with_as_many_ranks_or_others(
    ranks: int, undisturbed: tuple[Outcome, dict[str, int]], recipe: Callable[..., Config]
) -> None:
    def interrupt(row: UpdateRow) -> None:
        if row.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    config = recipe()
    directory = RunDirectory.create(config)
    first = train(config, directory, Watching(at_row=interrupt))
    assert first.interrupted
    assert 1 <= first.version.step < STEPS
    found = newest_checkpoint(directory.root)
    assert found is not None
    assert found.step == first.version.step
    second = train(directory.config((f"learner.ranks={ranks}",)), directory, Watching(), resume=True)
    check_trained_once(second.run)
    if ranks == 2:
        assert second.weights_digest == undisturbed[0].weights_digest
    expected = weights(undisturbed[0].run)
    for name, tensor in weights(second.run).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_ranks_that_share_the_weights_survive_a_kill_and_an_interruption(
    undisturbed: tuple[Outcome, dict[str, int]], recipe: Callable[..., Config]
) -> None:
    """Killed once, drained once, gone on with; what they made is what ranks with whole weights make."""
    sharing = ("learner.sharding=fsdp", "checkpoint.asynchronous=true", "checkpoint.every_steps=1")
    config = recipe(*sharing)
    straight = train(config, RunDirectory.create(config), Watching())
    killed: list[int] = []

    def disturb(row: UpdateRow) -> None:
        if row.step == 1 and not killed:
            killed.append(view.pids["learner-1"])
            os.kill(killed[0], signal.SIGKILL)
        elif row.step == 2 and row.epoch:
            os.kill(os.getpid(), signal.SIGTERM)

    view = Watching(at_row=disturb)
    directory = RunDirectory.create(config)
    first = train(config, directory, view)
    assert killed and first.version.epoch >= 1
    assert first.interrupted and first.version.step < STEPS
    second = train(config, directory, Watching(), resume=True)
    check_trained_once(second.run)
    assert second.weights_digest == straight.weights_digest
    # What is exported is read from rows of both ranks.
    exported = export_into(second.run) / "pipeline" / "transformer"
    stored = newest_checkpoint(second.run.root)
    assert stored is not None and stored.manifest["format"] == 2
    found = load_file(exported / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.state["ema"].items())
    expected = weights(undisturbed[0].run)
    for name, tensor in weights(second.run).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


def test_what_a_restart_cannot_mend_ends_all_ranks_at_once(
    tmp_path: Path, valkey: EmbeddedValkey, run_name: str, recipe: Callable[..., Config]
) -> None:
    secret = tmp_path / "password"
    secret.write_text(valkey.password)
    context = RunContext(
        run=run_name,
        directory=tmp_path,
        config=recipe("model.path=no/such/model/here"),
        queue_url=valkey.url,
        queue_password=SecretPlace(file=secret),
    )
    with pytest.raises(LearnerFailed, match=r"^PolicyError: .*no/such/model/here"):
        fit(context, None)
    for rank in (0, 1):
        log = (context.directory / "logs" / f"learner-{rank}.log").read_text()
        assert log.count("failed for good") == 1
