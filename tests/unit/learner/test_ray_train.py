"""Which failures of the learner are restarted, and which end the run with their own words."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from ranks_of_threads import all_of, together
from safetensors import SafetensorError

from learner import checkpoint, ray_train
from learner.checkpoint import CheckpointError, CheckpointsUnusable, write_checkpoint
from learner.loop import Start
from learner.ranks import Order, Ranks
from learner.ray_train import LearnerFailed, fit, train_rank
from learner.update import UpdateError
from policy.errors import PolicyError
from services.config_file import ConfigError, load_config
from services.context import RunContext
from services.group_queue import Fenced, QueueTimeout, QueueUnreachable, StateLost
from tests.recorded_groups import group


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunContext:
    queue = SimpleNamespace(beat=lambda beat, ttl: None)
    monkeypatch.setattr(RunContext, "open_queue", lambda self, part: queue)
    config = load_config("quickstart", ["cluster.start_deadline_s=7"])
    return RunContext(run="test", directory=tmp_path, config=config, queue_url="redis://nowhere")


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(context: RunContext, store: Any) -> None:
        raise error

    monkeypatch.setattr(ray_train, "PolicyTrainer", trainer)


def settings(context: RunContext) -> dict[str, Any]:
    return {"context": context.model_dump_json(), "store": None}


@pytest.mark.parametrize(
    "kind", [Fenced, QueueTimeout, PolicyError, ConfigError, UpdateError, ValueError, CheckpointsUnusable]
)
def test_what_a_restart_cannot_mend_is_told_and_not_raised(
    kind: type[Exception], context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(kind("step 3 is wrong"), monkeypatch)
    assert train_rank(settings(context)) == f"{kind.__name__}: step 3 is wrong"
    assert "step 3 is wrong" in (context.directory / "logs" / "learner-0.log").read_text()


@pytest.mark.parametrize(
    "kind", [ConnectionError, QueueUnreachable, StateLost, RuntimeError, OSError, CheckpointError]
)
def test_what_a_restart_may_mend_is_raised(
    kind: type[Exception], context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(kind("gone"), monkeypatch)
    with pytest.raises(kind, match="gone"):
        train_rank(settings(context))


@pytest.mark.parametrize(("device", "listens"), [("cuda", 1), ("cpu", 0)])
def test_ranks_that_talk_over_nccl_listen_where_ray_does_before_they_talk(
    device: str, listens: int, context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[None] = []

    def talk(*given: Any) -> None:
        raise RuntimeError("they talk")

    monkeypatch.setattr(ray_train, "_ranks", lambda config: SimpleNamespace(rank=0))
    monkeypatch.setattr(ray_train, "nccl_listens_where_ray_does", lambda: told.append(None))
    monkeypatch.setattr(ray_train, "together", talk)
    own = load_config("quickstart", ["learner.ranks=2", "learner.num_gpus=1", f"model.device={device}"])
    with pytest.raises(RuntimeError, match="they talk"):
        train_rank(settings(context.model_copy(update={"config": own})))
    assert len(told) == listens


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_no_more_ends_the_run(
    code: int, context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(OSError(code, os.strerror(code), "/runs/a/groups/shard"), monkeypatch)
    told = train_rank(settings(context))
    assert told is not None
    assert f"{os.strerror(code)}: '/runs/a/groups/shard'" in told
    assert " in /runs/a/groups, then go on with --resume" in told


def test_a_full_disk_behind_a_checkpoint_ends_the_run(
    context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes it: Python, which leaves the file out, or safetensors, which leaves the number out."""

    def flush(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(tensors: Any, file: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    state = {"policy": {"weight": torch.zeros(2)}}
    for target, name, replacement in ((os, "fsync", flush), (checkpoint, "save_file", save)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, replacement)
            with pytest.raises(CheckpointError) as caught:
                write_checkpoint(context.directory, 3, state, {}, keep=1)
        fail_with(caught.value, monkeypatch)
        told = train_rank(settings(context))
        assert told is not None
        assert str(context.directory / "checkpoints" / "step-3") in told
        assert f"free space in {context.directory}, then go on with --resume" in told


def test_a_full_disk_under_a_recording_ends_the_run(
    context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer works, the recording has no room: the file is named."""

    class Loop:
        def __init__(self, *parts: Any, record: Any, **more: Any) -> None:
            self._record = record

        def run(self, start: Start) -> None:
            monkeypatch.setattr(os, "fsync", flush)
            self._record([group(0)])

    def flush(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    recorded = load_config("quickstart", ["telemetry.record=true"])
    recording = context.model_copy(update={"config": recorded})
    monkeypatch.setattr(ray_train, "PolicyTrainer", lambda *parts: MagicMock(restore=Start))
    monkeypatch.setattr(ray_train, "LearnerLoop", Loop)
    told = train_rank(settings(recording))
    assert told is not None
    place = context.directory / "groups"
    assert "No space left on device" in told and str(place / ".shard-000000.safetensors.partial") in told
    assert f"free space in {place}, then go on with --resume" in told


def test_a_secret_that_is_not_there_is_told(context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_secret(self: RunContext, part: str) -> None:
        raise ConfigError("the environment variable REDIS_PASSWORD is not set")

    monkeypatch.setattr(RunContext, "open_queue", no_secret)
    told = train_rank(settings(context))
    assert told is not None
    assert "REDIS_PASSWORD" in told


@pytest.mark.parametrize("busy", [False, True])
def test_the_other_ranks_hear_why_the_run_ends_unless_they_are_in_the_middle_of_an_update(
    busy: bool, context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lead(context: RunContext, queue: Any, trainer: Any, pulse: Any, ranks: Ranks) -> None:
        ranks.settled()
        if busy:
            ranks.order_all(Order(do="train"))
        raise Fenced("epoch 2 has begun")

    monkeypatch.setattr(ray_train, "_lead", lead)

    def body(ranks: Ranks) -> list[Order]:
        if ranks.rank == 0:
            with pytest.raises(Fenced):
                ray_train._lead_others(context, None, None, None, ranks)  # type: ignore[arg-type]
            return []
        return [ranks.next_order(beside_s=0)[0]]

    _, (heard,) = all_of(together(2, body))
    assert heard == (Order(do="train") if busy else Order(do="end", reason="Fenced: epoch 2 has begun"))


@pytest.mark.parametrize(
    ("error", "heard"),
    [(OSError(errno.ENOSPC, "No space left", "/run/x"), "end"), (OSError("a hiccup"), "train")],
)
def test_the_other_ranks_hear_of_a_full_disk_and_not_of_what_is_restarted(
    error: OSError, heard: str, context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lead(context: RunContext, queue: Any, trainer: Any, pulse: Any, ranks: Ranks) -> None:
        ranks.settled()
        raise error

    monkeypatch.setattr(ray_train, "_lead", lead)

    def body(ranks: Ranks) -> Order | None:
        if ranks.rank > 0:
            return ranks.next_order(beside_s=0)[0]
        with pytest.raises(OSError, match=re.escape(str(error))):
            ray_train._lead_others(context, None, None, None, ranks)  # type: ignore[arg-type]
        if heard == "train":  # nothing was said yet
            ranks.order_all(Order(do="train"))
        return None

    _, order = all_of(together(2, body))
    assert order is not None
    assert order.do == heard
    assert heard == "train" or "/run/x" in str(order.reason)


class Fitted:
    """In the place of TorchTrainer; its `fit` does what the test says."""

    outcome: Any = None
    given: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        Fitted.given = kwargs

    def fit(self) -> Any:
        if isinstance(Fitted.outcome, Exception):
            raise Fitted.outcome
        return SimpleNamespace(return_value=Fitted.outcome)


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> type[Fitted]:
    monkeypatch.setattr("ray.train.torch.TorchTrainer", Fitted)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
    monkeypatch.setenv("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "60")
    return Fitted


def test_the_told_reason_ends_the_run(context: RunContext, fitted: type[Fitted]) -> None:
    fitted.outcome = None
    fit(context, None)
    fitted.outcome = "Fenced: epoch 2 has begun"
    with pytest.raises(LearnerFailed, match=r"^Fenced: epoch 2 has begun$"):
        fit(context, None)


def test_ranks_and_their_deadline_are_what_the_configuration_says(
    context: RunContext, fitted: type[Fitted]
) -> None:
    fitted.outcome = None
    settings = ["learner.ranks=4", "learner.rank_deadline_s=90", "learner.num_gpus=1", "model.device=cuda"]
    fit(context.model_copy(update={"config": load_config("quickstart", settings)}), None)
    assert fitted.given["scaling_config"].num_workers == 4
    assert fitted.given["torch_config"].timeout_s == 90
    assert fitted.given["torch_config"].backend == "cpu:gloo,cuda:nccl"


def test_another_error_of_the_controller_keeps_its_own_text(
    context: RunContext, fitted: type[Fitted]
) -> None:
    from ray.train import ControllerError

    fitted.outcome = ControllerError(OSError("storage path is read-only"))
    with pytest.raises(ControllerError, match="read-only"):
        fit(context, None)
