"""Large payloads lie beside the stream: kept exactly as long as their group, whole or not at all."""

from __future__ import annotations

import threading

import pytest
import redis
import torch
from queue_support import Run, version

from services.codec import EncodedGroup
from services.embedded import EmbeddedValkey
from services.group_queue import Admitted, Lease, QueueTimeout, connect
from services.queue_worker import INLINE_BYTES

pytestmark = pytest.mark.integration


@pytest.fixture
def run(valkey: EmbeddedValkey, run_name: str) -> Run:
    return Run(valkey, run_name, max_attempts=2)


@pytest.fixture
def client(valkey: EmbeddedValkey) -> redis.Redis:
    return connect(valkey.url, valkey.password)


def large(run: Run, lease: Lease, value: float = 1.0, worker: str = "w0") -> EncodedGroup:
    group = run.group(lease, worker=worker, tensors={"latents": torch.full((2, INLINE_BYTES), value)})
    assert len(group.payload) > INLINE_BYTES
    return group


def stored(run: Run, client: redis.Redis) -> dict[bytes, int]:
    """Payload keys and their time to live; -1 is for ever."""
    return {key: client.ttl(key) for key in client.scan_iter(match=run.raw("payload:*"))}


def test_a_large_group_is_trained_and_its_payload_goes_with_it(run: Run, client: redis.Redis) -> None:
    run.begin()
    first, second = run.leases()
    assert run.worker.admit_many([large(run, first), run.group(second)]) == [Admitted.OK, Admitted.OK]
    assert list(stored(run, client).values()) == [-1]
    assert run.learner.status().bytes > 2 * 4 * INLINE_BYTES
    big, small = run.learner.take(2, deadline_s=10)
    assert big.tensors["latents"].equal(torch.full((2, INLINE_BYTES), 1.0))
    assert small.tensors["latents"].shape == (2, 4)
    run.commit([0, 1])
    assert stored(run, client) == {}
    assert run.learner.status().bytes == 0


def test_a_large_group_sent_again_neither_expires_nor_multiplies(run: Run, client: redis.Redis) -> None:
    run.begin()
    first, _ = run.leases()
    answers = run.worker.admit_many([large(run, first), large(run, first), large(run, first, value=2.0)])
    assert answers == [Admitted.OK, Admitted.DUP, Admitted.DUP]
    assert list(stored(run, client).values()) == [-1]
    assert run.learner.take(1, deadline_s=10)[0].tensors["latents"][0, 0] == 1.0


def test_a_large_group_that_is_refused_leaves_nothing(run: Run, client: redis.Redis) -> None:
    run.begin()
    first, second = run.leases()
    assert run.worker.admit(large(run, Lease(first.ordinal, 1, version(0, 9)))) is Admitted.FUTURE
    tight = run.queue(max_bytes=1024)
    assert tight.admit(large(run, second)) is Admitted.FULL
    assert stored(run, client) == {}


def test_a_payload_without_its_admission_does_not_stay(run: Run, client: redis.Redis) -> None:
    """A worker that dies between storing and admitting."""
    run.begin()
    (first, _) = run.leases()
    group = large(run, first)
    pipeline = run.worker._client.pipeline(transaction=False)
    run.worker._send(pipeline, [group])
    name, *arguments = pipeline.command_stack[0][0]
    client.execute_command(name, *arguments)
    (seconds,) = stored(run, client).values()
    assert 0 < seconds <= 60


def test_a_large_group_whose_payload_vanished_is_made_again(
    run: Run, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    run.begin()
    first, second = run.leases()
    run.worker.admit_many([large(run, first), run.group(second)])
    client.delete(*stored(run, client))
    with pytest.raises(QueueTimeout, match="has 1 of 2"):
        run.learner.take(2, deadline_s=0.05)
    assert "has no payload" in caplog.text
    assert run.fill() == [0]
    assert run.step() == [0, 1]


def test_a_new_epoch_drops_the_payloads_of_the_groups_it_drops(run: Run, client: redis.Redis) -> None:
    run.begin()
    run.fill()
    run.step()
    for lease in run.leases():
        run.worker.admit(large(run, lease))
    assert len(stored(run, client)) == 2
    run.begin()
    assert stored(run, client) == {}
    assert run.learner.status().bytes == 0


def leaves(run: Run, client: redis.Redis) -> list[int]:
    """Which of the leaves to send a large payload are there."""
    return sorted(map(int, client.lrange(run.raw("uploads"), 0, -1)))


def test_without_memory_a_large_group_is_full_and_nothing_stays(run: Run, client: redis.Redis) -> None:
    run.begin()
    first, _ = run.leases()
    client.config_set("maxmemory", 1024 * 1024)
    try:
        assert run.worker.admit(large(run, first)) is Admitted.FULL
    finally:
        client.config_set("maxmemory", 0)
    assert stored(run, client) == {} and leaves(run, client) == [1, 2]
    assert run.worker.admit(large(run, first)) is Admitted.OK


def free(run: Run, client: redis.Redis) -> int:
    """How many large payloads may set out now."""
    return int(client.llen(run.raw("uploads")))


def test_a_few_large_payloads_at_a_time_are_on_their_way(run: Run, client: redis.Redis) -> None:
    """Who finds no leave waits until somebody's payload has arrived; small groups wait for nobody."""
    run = Run(run.server, run.name, max_uploads=1)
    run.begin()
    first, second = run.leases()
    assert client.blpop([run.raw("uploads")], timeout=5)
    verdicts: list[Admitted] = []
    waiting = threading.Thread(target=lambda: verdicts.append(run.queue().admit(large(run, first))))
    waiting.start()
    while not [one for one in client.client_list() if one["cmd"] == "blpop"]:
        assert waiting.is_alive()
    assert run.worker.admit(run.group(second)) is Admitted.OK
    assert [lease.ordinal for lease in run.learner.status().leases] == [first.ordinal]
    client.rpush(run.raw("uploads"), 1)
    waiting.join(timeout=30)
    assert verdicts == [Admitted.OK] and leaves(run, client) == [1]


def test_leaves_that_were_lost_come_back_and_are_no_more_than_they_were(
    run: Run, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With workers that were killed on their way: who waits in vain sends without, and none has come back."""
    run.begin()
    first, second = run.leases()
    assert leaves(run, client) == [1, 2] and run.config.max_uploads == 2
    client.delete(run.raw("uploads"))
    monkeypatch.setattr("services.queue_worker.UPLOAD_WAIT_S", 0.01)
    assert run.worker.admit(large(run, first)) is Admitted.OK
    assert leaves(run, client) == [1, 2]
    # One that only seemed lost, and comes back: beside itself, and by a command that is sent twice.
    for _ in range(2):
        run.worker._scripts.run("leave", 2, 2, 10_000)
    assert leaves(run, client) == [1, 2]
    # What comes back meanwhile is not lost, however many wait; what does not is, though the other comes back.
    client.delete(run.raw("uploads"))
    run.worker._scripts.run("leave", 0, 2, 10_000)
    assert leaves(run, client) == []
    client.hset(run.raw("policy"), "leave:1", 0)
    run.worker._scripts.run("leave", 0, 2, 10_000)
    assert leaves(run, client) == [1]
    run.begin()
    assert leaves(run, client) == [1, 2]
    assert run.worker.admit(large(run, second)) is Admitted.OK and leaves(run, client) == [1, 2]
