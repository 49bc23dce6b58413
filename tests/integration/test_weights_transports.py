"""Weights by every transport, between processes: they arrive as published, or are known to be gone."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.exceptions import RayActorError

from benchmarks.weights import transport_of
from services.codec import weights_digest
from services.config_file import load_config
from services.full_disk import disk_refuses
from services.messages import PolicyVersion, WeightsAnnouncement
from services.policy_store import PolicyStore, WeightsGone, WeightsMismatch, fetch, publish
from services.transports import pairs
from services.transports.choice import open_transport
from services.transports.gloo_pair import GlooPair
from services.transports.object_store import ObjectStoreTransport
from services.transports.pair import CHUNK_BYTES, CONNECT_S, Broken
from services.transports.pairs import PairsTransport
from services.transports.rendezvous import SILENCE_S, WeightsRequest
from services.transports.shared_directory import FOLDER, KEPT_FILES, SharedDirectoryTransport

pytestmark = pytest.mark.integration

DEADLINE_S = 60.0
AT_ONCE_S = 8.0
"""Less than anybody waits for who may be late."""
TRANSPORTS = ("object_store", "shared_directory", "process_groups")
BESIDE = TRANSPORTS[1:]
"""Beside the object store's, which test_policy_store.py is about."""


def tensors(seed: float, size: int = 1000) -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.full((size, 1), float(seed)),
        "b.weight": torch.arange(6).half() * seed,
    }


def over_gloo(store: Any, **settings: Any) -> PairsTransport:
    return PairsTransport(store, GlooPair, **settings)


def publisher() -> Any:
    """In a process of its own; defined in here, Ray ships its code and not a module name."""

    class Publisher:
        def begin(self, kind: str, directory: Path, store: Any) -> None:

            own = load_config("quickstart", [f"learner.publish_through={kind}"])
            self._transport = open_transport(own, directory, store)

        def publish(self, values: dict[str, torch.Tensor], step: int) -> str:
            from services.policy_store import publish

            version = PolicyVersion(epoch=0, step=step)
            return publish(self._transport, values, version).model_dump_json()

        def close(self) -> None:
            self._transport.close()

    return ray.remote(Publisher).options(num_cpus=0).remote()


class Rig:
    """A publisher in its process, and how to receive in this one."""

    def __init__(self, kind: str, directory: Path, store: Any) -> None:
        self._begins = (kind, directory, store)
        self.another = lambda: transport_of(kind, directory, store)
        self.receiver = self.another()
        self.begin()

    def begin(self) -> None:
        self.actor = publisher()
        ray.get(self.actor.begin.remote(*self._begins), timeout=DEADLINE_S)

    def publish(self, seed: float, step: int, **size: int) -> WeightsAnnouncement:
        told = self.actor.publish.remote(tensors(seed, **size), step)
        return WeightsAnnouncement.model_validate_json(ray.get(told, timeout=DEADLINE_S))


@pytest.fixture(scope="module")
def store(ray_local: None) -> Iterator[Any]:
    handle = ray.remote(PolicyStore).options(num_cpus=0).remote()
    yield handle
    ray.kill(handle)


@pytest.fixture
def rig(store: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(request.param, tmp_path, store)
    yield made
    ray.kill(made.actor)


@pytest.mark.parametrize(
    ("kind", "transport"),
    zip(TRANSPORTS, (ObjectStoreTransport, SharedDirectoryTransport, PairsTransport), strict=True),
)
def test_the_configuration_chooses(kind: str, transport: type, store: Any, tmp_path: Path) -> None:
    assert type(transport_of(kind, tmp_path, store)) is transport


@pytest.mark.parametrize("rig", BESIDE, indirect=True)
def test_versions_arrive_as_they_were_published(rig: Rig) -> None:
    # A little more than a chunk.
    first = rig.publish(3.0, 1, size=CHUNK_BYTES // 4)
    kept = fetch(rig.receiver, first)
    assert weights_digest(kept) == first.digest
    second = rig.publish(4.0, 2)
    assert weights_digest(fetch(rig.receiver, second)) == second.digest != first.digest
    assert weights_digest(kept) == first.digest, "what was received changed behind its receiver's back"
    assert weights_digest(fetch(rig.another(), second)) == second.digest, "another receiver has another pair"


@pytest.mark.parametrize("rig", BESIDE, indirect=True)
def test_old_versions_are_gone_at_once(rig: Rig) -> None:
    announced = [rig.publish(step, step) for step in range(6)]
    began = time.monotonic()
    with pytest.raises(WeightsGone, match=r"weights policy 0\.0: nobody has them"):
        fetch(rig.receiver, announced[0])
    assert time.monotonic() - began < AT_ONCE_S
    assert weights_digest(fetch(rig.receiver, announced[-1])) == announced[-1].digest


@pytest.mark.parametrize("rig", BESIDE, indirect=True)
def test_a_publisher_that_ends_leaves_nothing(rig: Rig, tmp_path: Path) -> None:
    announcement = rig.publish(1.0, 1)
    assert weights_digest(fetch(rig.receiver, announcement)) == announcement.digest
    ray.get(rig.actor.close.remote(), timeout=DEADLINE_S)
    began = time.monotonic()
    with pytest.raises(WeightsGone):
        fetch(rig.receiver, announcement)
    assert time.monotonic() - began < AT_ONCE_S < SILENCE_S
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize("rig", ["process_groups"], indirect=True)
def test_a_publisher_that_dies_is_known_by_its_silence(rig: Rig) -> None:
    announcement = rig.publish(1.0, 1)
    ray.kill(rig.actor)
    began = time.monotonic()
    with pytest.raises(WeightsGone):
        fetch(rig.receiver, announcement)
    assert time.monotonic() - began < SILENCE_S + DEADLINE_S / 2


@pytest.mark.parametrize("rig", TRANSPORTS, indirect=True)
def test_the_next_life_of_a_publisher_is_received_at_once_and_waits_for_nobody(rig: Rig) -> None:
    fetch(rig.receiver, rig.publish(1.0, 1))
    ray.kill(rig.actor)
    rig.begin()
    for step in (2, 3):
        began = time.monotonic()
        announcement = rig.publish(float(step), step)
        assert weights_digest(fetch(rig.receiver, announcement)) == announcement.digest
        assert time.monotonic() - began < AT_ONCE_S < CONNECT_S


@pytest.mark.parametrize("rig", ["process_groups"], indirect=True)
def test_a_receiver_that_never_comes_keeps_nobody_waiting(rig: Rig, store: Any) -> None:
    announcement = rig.publish(1.0, 1)
    dead = WeightsRequest(
        receiver="dead", connection="dead-1", connected=False, kind="policy", version=version(1)
    )
    assert ray.get(store.request.remote(dead.model_dump_json(), 5.0), timeout=DEADLINE_S) == "come"
    began = time.monotonic()
    assert weights_digest(fetch(rig.receiver, announcement)) == announcement.digest
    later = rig.publish(2.0, 2)
    assert weights_digest(fetch(rig.receiver, later)) == later.digest
    assert time.monotonic() - began < AT_ONCE_S < CONNECT_S


def test_a_store_without_a_publisher_says_so(store: Any) -> None:
    ray.get(store.publisher_begins.remote("somebody"), timeout=DEADLINE_S)
    ray.get(store.publisher_ends.remote("somebody"), timeout=DEADLINE_S)
    receiver = over_gloo(store)
    announcement = WeightsAnnouncement(version=version(1), digest="0", tensors=1, bytes=1)
    assert receiver.receive(announcement) is None


def version(step: int) -> PolicyVersion:
    return PolicyVersion(epoch=0, step=step)


def told(step: int, size: int = 3) -> WeightsAnnouncement:
    return WeightsAnnouncement(version=version(step), digest="0", tensors=1, bytes=size)


def test_files_of_a_shared_directory_are_few_whole_and_waited_for(tmp_path: Path) -> None:
    transport = SharedDirectoryTransport(tmp_path, patience_s=DEADLINE_S)
    payload = np.arange(3, dtype=np.uint8)
    for step in range(9, 12):
        transport.send(told(step), payload)
    transport.send(told(1).model_copy(update={"kind": "ema"}), payload)
    names = sorted(file.name for file in (tmp_path / FOLDER).iterdir())
    assert names == ["ema-0.1.safetensors", "policy-0.10.safetensors", "policy-0.11.safetensors"]
    assert len([name for name in names if name.startswith("policy")]) == KEPT_FILES
    late = threading.Timer(0.5, transport.send, (told(12), payload))
    late.start()
    found = SharedDirectoryTransport(tmp_path, patience_s=DEADLINE_S).receive(told(12))
    late.join()
    assert found is not None and found.tolist() == [0, 1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("size", [3, 2**20])
def test_a_full_disk_under_a_shared_directory_is_told_and_shows_no_file(tmp_path: Path, size: int) -> None:
    transport = SharedDirectoryTransport(tmp_path)
    payload = np.ones(size, dtype=np.uint8)
    transport.send(told(1, size), payload)
    partial = tmp_path / FOLDER / "policy-0.2.partial"
    partial.symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        transport.send(told(2, size), payload)
    said = disk_refuses(caught.value)
    assert said is not None and str(partial) in said
    assert [file.name for file in (tmp_path / FOLDER).glob("*.safetensors")] == ["policy-0.1.safetensors"]
    # What a publisher left half written goes with the next one's first version.
    SharedDirectoryTransport(tmp_path).send(told(3, size), payload)
    assert not list((tmp_path / FOLDER).glob("*.partial"))


def test_files_that_cannot_be_had_are_told_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    transport = SharedDirectoryTransport(tmp_path, patience_s=DEADLINE_S)
    assert transport.receive(told(1)) is None
    assert "no such folder: has this node the run directory?" in caplog.text
    transport.send(told(1), np.arange(3, dtype=np.uint8))

    def read(file: Path, **how: Any) -> Any:
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), str(file))

    monkeypatch.setattr(np, "fromfile", read)
    assert transport.receive(told(1)) is None
    assert "policy-0.1.safetensors" in caplog.text and os.strerror(errno.ETIMEDOUT) in caplog.text


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    transport = SharedDirectoryTransport(tmp_path)
    announcement = publish(transport, {"a": torch.ones(8)}, version(1))
    file = tmp_path / FOLDER / "policy-0.1.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(WeightsMismatch, match="not readable: truncated"):
        fetch(transport, announcement)


def test_a_publisher_over_process_groups_holds_one_version_of_a_kind(store: Any) -> None:
    transport = over_gloo(store)
    places = []
    for step in range(3):
        announcement = publish(transport, {"a": torch.full((8,), float(step))}, version(step))
        places.append(transport._kept["policy"][1].ctypes.data)
    assert len(set(places)) == 1, "a new version was not written over the former one"
    found = fetch(over_gloo(store), announcement)
    assert found["a"].tolist() == [2.0] * 8
    transport.close()


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """A publisher stops where it begins to send (the first event), until it may go on (the second)."""
    begun, go = threading.Event(), threading.Event()
    send = GlooPair.send

    def slow(self: Any, payload: Any) -> None:
        begun.set()
        assert go.wait(DEADLINE_S)
        send(self, payload)

    monkeypatch.setattr(GlooPair, "send", slow)
    return begun, go


def test_what_is_being_received_is_not_written_over(
    store: Any, blocked: tuple[threading.Event, threading.Event]
) -> None:
    begun, go = blocked
    transport, receiver = over_gloo(store), over_gloo(store)
    announcement = publish(transport, {"a": torch.ones(8)}, version(1))
    with ThreadPoolExecutor() as beside:
        fetched = beside.submit(fetch, receiver, announcement)
        assert begun.wait(DEADLINE_S)
        reclaimed = beside.submit(transport.reclaim, "policy")
        assert not wait([reclaimed], timeout=0.5).done, "the next version would be written over this one"
        go.set()
        assert weights_digest(fetched.result(DEADLINE_S)) == announcement.digest
        assert reclaimed.result(DEADLINE_S) is not None
    transport.close()


def test_a_receiver_that_takes_too_long_costs_memory_and_not_the_run(
    store: Any, blocked: tuple[threading.Event, threading.Event]
) -> None:
    begun, go = blocked
    transport = over_gloo(store, deadline_s=0.5)
    announcement = publish(transport, {"a": torch.ones(8)}, version(1))
    with ThreadPoolExecutor() as beside:
        fetched = beside.submit(over_gloo(store).receive, announcement)
        assert begun.wait(DEADLINE_S)
        assert transport.reclaim("policy") is None
        go.set()
        assert fetched.result(DEADLINE_S) is not None
    transport.close()


def test_a_connection_that_breaks_in_the_middle_is_made_anew_within_a_receive(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive, broken = GlooPair.receive, []

    def cut(self: Any, expected: int) -> Any:
        if not broken:
            broken.append(self)
            self._receive(torch.zeros(1, dtype=torch.int64))
            self.close()
            raise Broken("cut off")
        return receive(self, expected)

    monkeypatch.setattr(GlooPair, "receive", cut)
    # A send into what was cut off may only end with its deadline, and the next publish waits for that.
    transport = over_gloo(store, deadline_s=5)
    announcement = publish(transport, {"a": torch.ones(CHUNK_BYTES // 2)}, version(1))
    assert weights_digest(fetch(over_gloo(store), announcement)) == announcement.digest
    assert len(broken) == 1
    later = publish(transport, {"a": torch.zeros(CHUNK_BYTES // 2)}, version(2))
    assert weights_digest(fetch(over_gloo(store), later)) == later.digest
    transport.close()


def test_another_size_than_the_announced_one_is_not_received(store: Any) -> None:
    transport, receiver = over_gloo(store), over_gloo(store)
    announcement = publish(transport, {"a": torch.ones(8)}, version(1))
    assert receiver.receive(announcement.model_copy(update={"bytes": 10**15})) is None
    assert receiver.receive(announcement) is not None
    transport.close()


def test_connections_listen_where_ray_does(store: Any) -> None:
    transport, receiver = over_gloo(store), over_gloo(store)
    receiver.receive(publish(transport, {"a": torch.ones(8)}, version(1)))
    own = {place.laddr.ip for place in psutil.Process().net_connections() if place.status == "LISTEN"}
    assert own and {ip.removeprefix("::ffff:") for ip in own} == {"127.0.0.1"}
    transport.close()


def test_a_publisher_without_a_store_is_told(ray_local: None) -> None:
    own = ray.remote(PolicyStore).options(num_cpus=0).remote()
    transport = over_gloo(own)
    publish(transport, {"a": torch.ones(8)}, version(1))
    ray.kill(own)
    with pytest.raises(RayActorError):
        publish(transport, {"a": torch.ones(8)}, version(2))
    transport.close()


def test_idle_connections_are_closed_and_made_anew(store: Any) -> None:
    transport, receiver = over_gloo(store), over_gloo(store)
    announcement = publish(transport, {"a": torch.ones(8)}, version(1))
    fetch(receiver, announcement)
    (idle,) = transport._connections.values()
    idle.used -= 2 * pairs.IDLE_S
    fetch(over_gloo(store), announcement)
    assert idle not in transport._connections.values() and len(transport._connections) == 1
    assert weights_digest(fetch(receiver, announcement)) == announcement.digest
    transport.close()
