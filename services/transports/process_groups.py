"""Weights straight from the learner to each worker, through a process group of the two: NCCL from GPU to GPU,
Gloo where either has none.

Promises
- Neither Ray's object store nor a disk holds them, and their publisher holds one version of each kind: for
  full fine-tuning of large models.
- Who wants a version asks for it by the PolicyStore actor, through which both also find each other.
- Each pair has its group for as long as both live. One that dies costs its own pair alone; the next request
  makes a new one.
- Every wait has a deadline; a publisher that has ended is known, not waited for.

torch's process groups, and not Ray's collectives: over Gloo those take the process's default group, which on
a learner is that of its ranks, and over NCCL they need CuPy.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, Final
from uuid import uuid4

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayActorError
from torch import Tensor

from services.messages import WeightsAnnouncement
from services.safetensors_layout import Bytes
from services.transports.base import DEADLINE_S
from services.transports.meeting import Answer, Want

CHUNK_BYTES: Final = 64 * 1024**2
LISTEN_S: Final = 2.0
"""The publisher asks for requests for so long at a time."""
GRACE_S: Final = 10.0
"""For an answer of the store's actor, beyond what it was asked to wait."""

log = logging.getLogger(__name__)


class ProcessGroupsTransport:
    """See the module. From the first `send` on a publisher; else a receiver, of one thread.

    Args:
        store: handle of the PolicyStore actor.
        device: `model.device`.
        deadline_s: for a chunk to arrive, and for every answer.
    """

    keeps_payload = True

    def __init__(self, store: Any, *, device: str = "auto", deadline_s: float = DEADLINE_S) -> None:
        self._store = store
        self._device = device
        self._deadline_s = deadline_s
        self._kept: dict[str, tuple[WeightsAnnouncement, Bytes]] = {}
        self._sending: dict[str, int] = {}
        self._changed = threading.Condition()
        self._pairs: dict[str, _Pair] = {}
        self._listening: threading.Thread | None = None
        self._closed = threading.Event()
        self._own: _Pair | None = None

    def reclaim(self, kind: str) -> Bytes | None:
        """Waits for who is just receiving it."""
        with self._changed:
            found = self._kept.pop(kind, None)
            done = self._changed.wait_for(lambda: not self._sending.get(kind), self._deadline_s)
        return found[1] if found is not None and done else None

    def send(self, announcement: WeightsAnnouncement, payload: Bytes) -> None:
        with self._changed:
            self._kept[announcement.kind] = (announcement, payload)
        if self._listening is None:
            ray.get(self._store.publisher_begins.remote(), timeout=self._deadline_s)
            self._listening = threading.Thread(target=self._listen, name="weights", daemon=True)
            self._listening.start()

    def close(self) -> None:
        self._closed.set()
        if self._listening is None:
            return
        try:
            ray.get(self._store.publisher_ends.remote(), timeout=GRACE_S)
        except (GetTimeoutError, RayActorError) as error:
            log.warning("the store was not told that the publisher ends: %s", type(error).__name__)

    def receive(self, announcement: WeightsAnnouncement) -> Bytes | None:
        where = f"weights {announcement.kind} {announcement.version}"
        name = self._own.name if self._own is not None else uuid4().hex[:12]
        want = Want(
            pair=name,
            kind=announcement.kind,
            version=announcement.version,
            gpu=_gpu(self._device) is not None,
        )
        told = self._store.want.remote(want.model_dump_json(), self._deadline_s)
        try:
            answer: Answer | None = ray.get(told, timeout=self._deadline_s + GRACE_S)
        except GetTimeoutError as error:
            raise TimeoutError(f"{where}: the policy store did not answer") from error
        if answer is None or answer == "gone":
            log.warning("%s: %s", where, answer or "nobody publishes")
            return None
        payload = np.empty(announcement.bytes, dtype=np.uint8)
        try:
            if self._own is None:
                self._own = self._pair(name, 1, answer)
            self._own.receive(payload)
        except (RuntimeError, TimeoutError) as error:
            log.warning("%s were cut off: %s", where, error)
            own, self._own = self._own, None
            if own is not None:
                own.close()
            return None
        return payload

    def _listen(self) -> None:
        # A call of Ray in a process that has left it would join whatever Ray it finds.
        while not self._closed.is_set() and ray.is_initialized():
            try:
                told = ray.get(self._store.next_want.remote(LISTEN_S), timeout=LISTEN_S + GRACE_S)
            except (GetTimeoutError, RayActorError) as error:
                if not self._closed.wait(LISTEN_S):
                    log.warning("requests for weights are not heard: %s", type(error).__name__)
                continue
            if told is not None:
                want = Want.model_validate_json(told)
                # A thread each: who is slow, or dies, keeps nobody else waiting.
                threading.Thread(
                    target=self._answer, args=(want,), name=f"weights to {want.pair}", daemon=True
                ).start()

    def _answer(self, want: Want) -> None:
        with self._changed:
            announcement, payload = self._kept.get(want.kind, (None, None))
            if announcement is None or payload is None or announcement.version != want.version:
                self._say(want, "gone")
                return
            self._sending[want.kind] = self._sending.get(want.kind, 0) + 1
        how: Answer = "nccl" if want.gpu and _gpu(self._device) is not None else "gloo"
        try:
            self._say(want, how)
            if want.pair not in self._pairs:
                self._pairs[want.pair] = self._pair(want.pair, 0, how)
            self._pairs[want.pair].send(payload)
        except (RuntimeError, TimeoutError) as error:
            log.warning("weights %s %s were cut off: %s", want.kind, want.version, error)
            pair = self._pairs.pop(want.pair, None)
            if pair is not None:
                pair.close()
        finally:
            with self._changed:
                self._sending[want.kind] -= 1
                self._changed.notify_all()

    def _say(self, want: Want, answer: Answer) -> None:
        self._store.answer.remote(want.number, answer)

    def _pair(self, name: str, rank: int, how: Answer) -> _Pair:
        device = _gpu(self._device) if how == "nccl" else None
        return _Pair(self._store, name, rank=rank, gpu=device, deadline_s=self._deadline_s)


class _Pair:
    """A process group of publisher (rank 0) and receiver.

    Args:
        gpu: on which chunks travel, by NCCL; None: from host memory, by Gloo.
    """

    def __init__(
        self, store: Any, name: str, *, rank: int, gpu: torch.device | None, deadline_s: float
    ) -> None:
        self.name = name
        self._store, self._peer, self._gpu, self._deadline_s = store, 1 - rank, gpu, deadline_s
        self._deadline = timedelta(seconds=deadline_s)
        self._one_at_a_time = threading.Lock()
        found = _Finding(store, name, deadline_s)
        if gpu is not None:
            nccl: Any = dist.ProcessGroupNCCL
            of_nccl = nccl.Options()
            of_nccl._timeout = self._deadline
            self._group: Any = nccl(found, rank, 2, of_nccl)
            self._staging = torch.empty(CHUNK_BYTES, dtype=torch.uint8, device=gpu)
            return
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = self._deadline
        # Where Ray's own connections are: loopback, unless the cluster has several nodes.
        address = ray.util.get_node_ip_address()
        options._devices = [gloo.create_device(hostname=address)]
        self._group = gloo(found, rank, 2, options)

    def send(self, payload: Bytes) -> None:
        """Raises RuntimeError or TimeoutError: the receiver is gone, or too slow."""
        with self._one_at_a_time, self._on_gpu():
            for chunk in _chunks(payload):
                self._travel(chunk, lambda there: self._group.send([there], self._peer, 0), out=True)

    def receive(self, payload: Bytes) -> None:
        """Into `payload`. Raises as `send`."""
        with self._one_at_a_time, self._on_gpu():
            for chunk in _chunks(payload):
                self._travel(chunk, lambda there: self._group.recv([there], self._peer, 0), out=False)

    def close(self) -> None:
        if self._gpu is not None:
            self._group.abort()
        self._store.forget.remote(self.name)

    def _travel(self, chunk: Tensor, start: Callable[[Tensor], Any], *, out: bool) -> None:
        if self._gpu is None:
            start(chunk).wait(self._deadline)
            return
        there = self._staging[: len(chunk)]
        if out:
            there.copy_(chunk)
        start(there).wait()
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        give_up = time.monotonic() + self._deadline_s
        while not done.query():  # type: ignore[no-untyped-call]
            if time.monotonic() > give_up:
                raise TimeoutError(f"a chunk did not travel within {self._deadline_s:g} s")
            time.sleep(0.0005)
        if not out:
            chunk.copy_(there)

    def _on_gpu(self) -> Any:
        return nullcontext() if self._gpu is None else torch.cuda.device(self._gpu)


_Store: Any = getattr(dist, "Store")  # noqa: B009 - torch's stubs do not have it


class _Finding(_Store):  # type: ignore[misc]
    """What process groups find their members by, kept by the PolicyStore actor: no port is opened for it."""

    def __init__(self, store: Any, pair: str, deadline_s: float) -> None:
        super().__init__()
        self._store, self._pair, self._deadline_s = store, pair, deadline_s

    def set(self, key: str, value: bytes | str) -> None:
        content = value.encode() if isinstance(value, str) else bytes(value)
        ray.get(self._store.set_value.remote(f"{self._pair}/{key}", content), timeout=self._deadline_s)

    def get(self, key: str) -> bytes:
        told = self._store.value.remote(f"{self._pair}/{key}", self._deadline_s)
        found: bytes | None = ray.get(told, timeout=self._deadline_s + GRACE_S)
        if found is None:
            raise TimeoutError(f"the other side of {self._pair} did not come within {self._deadline_s:g} s")
        return found

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)


def _gpu(device: str) -> torch.device | None:
    """The GPU that `model.device` means; None: none."""
    if device == "cpu" or not torch.cuda.is_available():
        return None
    return torch.device("cuda" if device == "auto" else device)


def _chunks(payload: Bytes) -> Iterator[Tensor]:
    yield from torch.from_numpy(payload).split(CHUNK_BYTES)  # type: ignore[no-untyped-call]
