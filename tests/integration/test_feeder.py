"""The feeder's loop against a real queue: groups as recorded under new names, damaged ones given up."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from rollout_workers.feeder import feeder_loop
from services.embedded import EmbeddedValkey
from services.heartbeat import Pulse
from services.offline import place_of
from services.recording import Recording
from tests.integration.queue_support import Run, weights
from tests.recorded_groups import group, record

pytestmark = pytest.mark.integration


def feed(run: Run, directory: Path) -> threading.Thread:
    queue = run.queue()
    pulse = Pulse("feeder-0", queue.beat, lambda ordinal: queue.renew("feeder-0", ordinal))
    loop = feeder_loop("feeder-0", queue, run.name, Recording.open(directory), 0, pulse)
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    return thread


def test_groups_come_as_recorded_under_this_runs_name(
    valkey: EmbeddedValkey, run_name: str, tmp_path: Path
) -> None:
    record(tmp_path, [group(ordinal) for ordinal in (3, 4, 8)])
    run = Run(valkey, run_name, steps=3)
    run.begin()
    thread = feed(run, tmp_path)
    for step in range(3):
        taken = run.learner.take(2, deadline_s=20)
        for found in taken:
            ordinal = found.header.ordinal
            wanted = group((3, 4, 8)[place_of(0, ordinal, 3)])
            assert found.header.version.step == step
            assert (found.header.run, found.header.worker) == (run_name, "feeder-0")
            assert found.header.rewards == wanted.header.rewards
            assert (found.header.prompt, found.header.seeds) == (wanted.header.prompt, wanted.header.seeds)
            assert all(torch.equal(found.tensors[name], tensor) for name, tensor in wanted.tensors.items())
        following = taken[0].header.version.model_copy(update={"step": step + 1})
        ordinals = [found.header.ordinal for found in taken]
        assert ordinals == [2 * step, 2 * step + 1]
        run.learner.commit(weights(following), ordinals)
    run.learner.set_state("done")
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_a_damaged_group_is_given_up_with_its_shard_and_the_others_are_trained(
    valkey: EmbeddedValkey, run_name: str, tmp_path: Path
) -> None:
    record(tmp_path, [group(ordinal) for ordinal in range(6)])
    shard = tmp_path / "shard-000000.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))
    run = Run(valkey, run_name, steps=1, max_attempts=2)
    run.begin()
    thread = feed(run, tmp_path)
    assert [found.header.ordinal for found in run.learner.take(2, deadline_s=20)] == [2, 3]
    letters = run.learner.dead_letters()
    assert [letter.ordinal for letter in letters] == [0, 1]
    assert all("shard-000000.safetensors" in letter.reason for letter in letters)
    run.learner.set_state("done")
    thread.join(timeout=60)
