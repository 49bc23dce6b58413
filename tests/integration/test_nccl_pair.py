"""Weights over NCCL: what is ours of it, over TCP in the place of GPUs, and all of it on GPUs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from services.codec import weights_digest
from services.messages import PolicyVersion
from services.policy_store import PolicyStore, fetch, publish
from services.transports.nccl_pair import NcclPair, nccl_pairs
from services.transports.pair import CHUNK_BYTES, Broken
from services.transports.pairs import PairsTransport
from tests.integration.nccl_gpus import gpus_to_join, needs_nccl
from tests.integration.tcp_wire import TcpWire

pytestmark = pytest.mark.integration

DEADLINE_S = 60.0
AT_ONCE_S = 8.0


class Unreached(TcpWire):
    """Never gets across."""

    def send(self, tensor: Tensor, peer: int) -> None:
        self._open.recv(1)
        raise RuntimeError("aborted")


def wait_for(comes: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not comes() and time.monotonic() < until:
        time.sleep(0.05)
    assert comes()


def version(step: int) -> PolicyVersion:
    return PolicyVersion(epoch=0, step=step)


def over(wire: type[TcpWire], store: Any, **settings: Any) -> PairsTransport:
    return PairsTransport(store, partial(NcclPair, wire=wire), **settings)


@pytest.fixture(scope="module")
def store(ray_local: None) -> Iterator[Any]:
    handle = ray.remote(PolicyStore).options(num_cpus=0).remote()
    yield handle
    ray.kill(handle)


def threads() -> set[int | None]:
    return {thread.ident for thread in threading.enumerate() if thread.name.startswith("nccl ")}


def test_versions_arrive_as_they_were_published_and_no_thread_stays(store: Any) -> None:
    before = threads()
    transport, receiver = over(TcpWire, store), over(TcpWire, store)
    for step in (1, 2):
        # A little more than a chunk.
        tensors = {"a": torch.full((CHUNK_BYTES // 4 + 3,), float(step)), "b": torch.arange(5).half()}
        announcement = publish(transport, tensors, version(step))
        assert weights_digest(fetch(receiver, announcement)) == announcement.digest == weights_digest(tensors)
    assert len(threads() - before) == 2, "both versions over one connection"
    for connection in (*transport._connections.values(), receiver._connection):
        assert connection is not None
        connection.close()
    transport.close()
    wait_for(lambda: not threads() - before)


def test_who_does_not_come_is_not_waited_for_by_nccl(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.transports.pair.CONNECT_S", connect_s := 2.0)
    joined = []

    class Watched(TcpWire):
        def join(self, unique: bytes, rank: int) -> None:
            joined.append(rank)
            super().join(unique, rank)

    began = time.monotonic()
    with pytest.raises(Broken, match=f"did not come within {connect_s:g} s"):
        NcclPair(store, "alone", rank=0, deadline_s=DEADLINE_S, wire=Watched)
    assert time.monotonic() - began < connect_s + AT_ONCE_S and not joined


def test_a_call_of_nccl_that_never_ends_is_aborted_at_the_deadline(store: Any) -> None:
    before = threads()
    transport, receiver = over(Unreached, store, deadline_s=1.0), over(TcpWire, store)
    announcement = publish(transport, {"a": torch.ones(8)}, version(1))
    began = time.monotonic()
    # The receiver hears of the abort, asks again as often as it may, and gives up.
    assert receiver.receive(announcement) is None
    assert time.monotonic() - began < DEADLINE_S / 2
    wait_for(lambda: not transport._connections)
    wait_for(lambda: not threads() - before)
    transport.close()


def test_an_error_of_nccl_breaks_the_connection_in_one_line(store: Any) -> None:
    with ThreadPoolExecutor() as beside:
        other = beside.submit(NcclPair, store, "cut", rank=0, deadline_s=DEADLINE_S, wire=TcpWire)
        here = NcclPair(store, "cut", rank=1, deadline_s=DEADLINE_S, wire=TcpWire)
        other.result(DEADLINE_S).close()
    with pytest.raises(Broken, match=r"^the other side is gone$"):
        here.receive(8)
    here.close()


@needs_nccl
def test_from_one_gpu_to_another(store: Any) -> None:
    first, second = (torch.device("cuda", index) for index in gpus_to_join())
    transport = PairsTransport(store, nccl_pairs(first))
    receiver = PairsTransport(store, nccl_pairs(second))
    tensors = {"a": torch.randn(CHUNK_BYTES // 2, device=first), "b": torch.arange(5, device=first).half()}
    for step in (1, 2):
        announcement = publish(transport, tensors, version(step))
        found = fetch(receiver, announcement)
        assert weights_digest(found) == announcement.digest
        assert torch.equal(found["a"], tensors["a"].cpu())
        tensors["a"] += 1
    # A receiver that dies: the publisher is not held up, and the next one gets its weights.
    assert receiver._connection is not None
    receiver._connection.close()
    announcement = publish(transport, tensors, version(3))
    again = PairsTransport(store, nccl_pairs(second))
    assert weights_digest(fetch(again, announcement)) == announcement.digest
    transport.close()
