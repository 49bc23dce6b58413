"""What ranks that share the weights publish and write is the whole model's; any number of ranks reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_runs import (
    BUCKET_BYTES,
    FILE_BYTES,
    Shelf,
    publishes_and_writes,
    state_of,
    train,
    trainer_of,
    version,
)
from torch import Tensor

from learner.checkpoint import (
    CheckpointError,
    newest_checkpoint,
    open_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from policy.probe import probe, probe_error
from rollout_workers.suite_worker import _proven
from services.checkpoint_parts import digest_of_part, files_of, read_part
from services.codec import decode_weights, weights_digest
from services.config_file import ConfigError
from services.group_queue import Frontier
from services.policy_store import fetch
from tests.ranks_of_processes import each_of

TORN = "checkpoints/step-3"


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of everything that four processes have done."""
    place = tmp_path_factory.mktemp("sharded")
    single = trainer_of(place / "single", None)
    losses = train(single, range(2))
    single.checkpoint(version(2), Frontier(below=6))
    torch.save({"losses": losses, "state": state_of(single)}, place / "single.pt")
    stored = read_checkpoint(place / "single" / "checkpoints" / "step-2")
    torn = write_checkpoint(place / "single", 3, stored.state, {**stored.manifest}, keep=2)
    (torn / "ema.safetensors").write_bytes(b"torn")
    each_of(4, publishes_and_writes, place)
    return place


@pytest.fixture(scope="module")
def found(folder: Path) -> Any:
    return torch.load(folder / "on-2.pt", weights_only=False)


def of(folder: Path, name: str) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=False)


def test_updates_of_a_model_in_blocks_are_those_of_one_rank(folder: Path, found: Any) -> None:
    single = of(folder, "single")
    assert found["losses"][:2] == pytest.approx(single["losses"], rel=1e-6, abs=1e-6)
    stored = newest_checkpoint(folder / "single")
    assert stored is not None
    trained = of(folder, "on-4")["state"]
    for name, tensor in stored.state["policy"].items():
        assert trained[f"policy.{name}"].shape == tensor.shape


def test_what_is_published_is_whole_and_proven(found: Any) -> None:
    start, policy, ema = (decode_weights(payload.numpy()) for payload in found["payloads"])
    assert weights_digest(start) == found["start"].digest
    assert weights_digest(policy) == found["policy"].digest
    assert found["policy"].tensors == len(policy)
    assert weights_digest(ema) == found["ema"].digest != found["policy"].digest


def test_the_velocity_that_is_announced_is_that_of_the_whole_model_as_it_is_published(
    folder: Path, found: Any
) -> None:
    policy = trainer_of(folder / "alone", None).policy
    start, behind, ema = (decode_weights(payload.numpy()) for payload in found["payloads"])
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in behind.items()}
    half = of(folder, "again-on-2")["loaded"]
    for announced, tensors in ((found["start"], start), (found["ema"], ema), (half, rounded)):
        assert probe_error(announced.probe, probe(policy, tensors)) < 1e-6
    assert probe_error(half.probe, probe(policy, behind)) > 1e-5
    assert found["policy"].probe is None


def test_publishing_holds_one_wire_buffer_and_one_bucket(found: Any) -> None:
    wire = found["policy"].bytes
    assert wire <= found["buffers"] < wire * 1.1
    largest = max(BUCKET_BYTES, max(t.nbytes for t in decode_weights(found["payloads"][1].numpy()).values()))
    # What arrives from two ranks, and what this one sends.
    assert 0 < found["tensors"] <= 1.6 * largest < 0.6 * wire


def test_weights_travel_in_the_dtype_that_was_asked_for(folder: Path, found: Any) -> None:
    half = of(folder, "again-on-2")["loaded"]
    policy = decode_weights(found["payloads"][1].numpy())
    assert half.digest == weights_digest({name: t.to(torch.bfloat16) for name, t in policy.items()})
    assert half.bytes < 0.51 * found["policy"].bytes
    # What its publisher no longer has comes from the checkpoint, which is float32 and in rows.
    for announced in (half, found["policy"], found["ema"]):
        fetched = fetch(Shelf(), announced, folder / "run")
        assert weights_digest(fetched) == announced.digest


def test_two_ranks_go_on_bit_for_bit_from_a_checkpoint_written_behind_the_training(
    folder: Path, found: Any
) -> None:
    """Those that go on keep less of a forward pass (learner.gradient_checkpointing)."""
    again = of(folder, "again-on-2")
    assert (again["start"].step, again["start"].frontier) == (2, Frontier(below=6))
    assert again["losses"] == found["losses"][2:]
    same(again["state"], found["state"])


def test_any_number_of_ranks_reads_what_another_wrote(folder: Path) -> None:
    """Two wrote, four and one read; one wrote, four read."""
    written, single = of(folder, "again-on-2")["state"], of(folder, "single")["state"]
    same(of(folder, "on-4")["state"], written)
    assert of(folder, "on-4")["start"].step == 4
    same(of(folder, "single-on-4")["state"], single)
    # A newer one that is damaged: rank 0 tells of it, and it is kept.
    (told,) = of(folder, "single-on-4")["start"].passed_over
    assert f"{TORN}/ema.safetensors: its sha256" in told
    assert (folder / "single" / f"{TORN}.unverified" / "ema.safetensors").read_bytes() == b"torn"
    alone = trainer_of(folder / "run", None)
    assert alone.begin().step == 4
    same(state_of(alone), written)
    train(alone, range(4, 5))


def test_a_checkpoint_in_rows_is_verified_and_names_what_each_rank_wrote(folder: Path) -> None:
    stored = newest_checkpoint(folder / "run")
    assert stored is not None and stored.manifest["format"] == 2
    files = stored.manifest["files"]
    assert {name.partition("/")[0] for name in files} == {"policy", "ema", "reference", "optimizer"}
    for part in ("policy", "optimizer"):
        assert {name.split("-")[1] for name in files if name.startswith(part)} == {"00001", "00002"}
    # No file is larger than asked for, but for a tensor's rows.
    rows = max(tensor.nbytes for tensor in stored.state["policy"].values()) // 2
    assert all(entry["bytes"] < max(FILE_BYTES, rows) + 2**16 for entry in files.values())
    damaged = stored.path / sorted(files)[-1]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    fallback = newest_checkpoint(folder / "run")
    damaged.write_bytes(content)
    assert fallback is not None and fallback.step == 2


def test_an_evaluation_reads_rows_as_they_were_verified(folder: Path) -> None:
    stored = newest_checkpoint(folder / "run")
    assert stored is not None
    digest = stored.digest("ema")
    assert digest == digest_of_part(stored.path, "ema")
    read = _proven(stored.path, "ema", digest)
    same(read, dict(stored.state["ema"]))
    with pytest.raises(ConfigError, match="it has changed"):
        _proven(stored.path, "ema", "0" * 64)


def test_rows_that_are_missing_or_torn_are_an_error_and_no_weights(folder: Path) -> None:
    stored = newest_checkpoint(folder / "run")
    assert stored is not None
    # Without the last rows a tensor has another shape, which every reader compares.
    gone = files_of(stored.path / "ema")[0]
    content = gone.read_bytes()
    try:
        gone.unlink()
        with pytest.raises(OSError, match="rows are missing"):
            read_part(stored.path, "ema")
        with pytest.raises(CheckpointError, match=gone.name):
            open_checkpoint(stored.path)
        gone.write_bytes(content[: len(content) // 2])
        with pytest.raises(OSError, match="cannot be read"):
            read_part(stored.path, "ema")
    finally:
        gone.write_bytes(content)
