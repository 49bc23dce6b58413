"""Over NCCL: from the learner's GPU to that of a receiver, by NVLink, InfiniBand or sockets.

Promises
- Every wait has a deadline, though NCCL's own have none: all its calls are made in a thread of the
  connection. One that takes too long breaks the connection, and closing that aborts the communicator, which
  ends the call too. Only joining cannot be ended from outside: its thread is left to it, and ends if it ever
  does.
- It listens where Ray does, unless NCCL_SOCKET_IFNAME says where.

Bytes pass the host memory of both sides, where their digest is taken: each chunk goes to the GPU, across, and
back. By CuPy, as Ray's collectives do it, but not by those: they wait without a deadline, and leave an actor
for each pair.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, Protocol, TypeVar

import torch
from ray.exceptions import RayError
from torch import Tensor

from services.config_file import ConfigError
from services.ray_runtime import nccl_listens_where_ray_does
from services.transports.pair import Broken, Pair, first_line
from services.transports.pairs import Connect

MEET_S: Final = 60.0
"""For NCCL to join two GPUs, once both sides are there."""
POLL_S: Final = 0.0005

Result = TypeVar("Result")


class Wire(Protocol):
    """What two GPUs are joined by. A call returns when it is done, which may be never; errors are
    RuntimeErrors."""

    def unique(self) -> bytes:
        """What the other side joins by."""
        ...

    def join(self, unique: bytes, rank: int) -> None: ...

    def send(self, tensor: Tensor, peer: int) -> None:
        """In host memory, as for `receive`."""
        ...

    def receive(self, tensor: Tensor, peer: int) -> None: ...

    def abort(self) -> None:
        """From any thread: who sends or receives does not any more."""
        ...


def nccl_pairs(device: torch.device) -> Connect:
    """Makes connections of this process's GPU.

    Raises:
        ConfigError: it has none, or CuPy is missing.
    """
    nccl = _library()
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ConfigError(
            f"learner.publish_through nccl: the model is on {device} here, and NCCL joins CUDA devices: give "
            "learner, rollout and eval num_gpus, or take process_groups"
        )
    # Not the thread's own one, which is the first in each new thread.
    index = torch.cuda.current_device() if device.index is None else device.index
    nccl_listens_where_ray_does()
    return partial(NcclPair, wire=lambda: CardWire(nccl, torch.device("cuda", index)))


class NcclPair(Pair):
    """See the module and `Pair`.

    Args:
        wire: makes what the two are joined by.
    """

    def __init__(
        self, store: Any, name: str, *, rank: int, deadline_s: float, wire: Callable[[], Wire]
    ) -> None:
        super().__init__(store, name, rank=rank, deadline_s=deadline_s)
        self._wire, self._thread = wire(), _Thread(name)
        try:
            # NCCL waits for ever for who is not there: each says first that it is.
            if rank == 0:
                unique = self._within(MEET_S, self._wire.unique)
                self._members.set("unique", unique)
                self._members.get("there")
            else:
                unique = self._members.get("unique")
                self._members.set("there", b"there")
            self._within(MEET_S, partial(self._wire.join, unique, rank))
        except (TimeoutError, RayError) as error:
            self.close()
            raise Broken(str(error)) from error
        except Broken:
            self.close()
            raise

    def close(self) -> None:
        self._wire.abort()
        self._thread.end()
        self._forget()

    def _send(self, tensor: Tensor) -> None:
        self._within(self._deadline_s, partial(self._wire.send, tensor, self._peer))

    def _receive(self, tensor: Tensor) -> None:
        self._within(self._deadline_s, partial(self._wire.receive, tensor, self._peer))

    def _within(self, seconds: float, call: Callable[[], Result]) -> Result:
        try:
            return self._thread.run(call).result(seconds)
        except TimeoutError as error:
            raise Broken(f"NCCL has not answered for {seconds:g} s") from error
        except RuntimeError as error:
            raise Broken(first_line(error)) from error


class CardWire:
    """A communicator of two GPUs, and a stream of its own.

    An abort frees the communicator: nobody may look at it then. What only looks does so under the lock; a
    call that may wait does not, since it is the abort that ends it.

    Args:
        nccl: `cupy.cuda.nccl`.
        device: of this side.
    """

    def __init__(self, nccl: Any, device: torch.device) -> None:
        self._nccl, self._device = nccl, device
        self._communicator: Any = None
        self._aborted, self._looking = False, threading.Lock()

    def unique(self) -> bytes:
        return bytes(self._nccl.get_unique_id())

    def join(self, unique: bytes, rank: int) -> None:
        with torch.cuda.device(self._device):
            # Beside what trains or samples on the default stream.
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            joined = self._nccl.NcclCommunicator(2, unique, rank)
        with self._looking:
            if not self._aborted:
                self._communicator = joined
                return
        joined.abort()
        raise RuntimeError("joined too late")

    def send(self, tensor: Tensor, peer: int) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            stage = tensor.view(torch.uint8).to(self._device)
            self._communicator.send(*self._of(stage), peer, self._stream.cuda_stream)
            self._finish()

    def receive(self, tensor: Tensor, peer: int) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            there = tensor.view(torch.uint8)
            stage = torch.empty_like(there, device=self._device)
            self._communicator.recv(*self._of(stage), peer, self._stream.cuda_stream)
            self._finish()
            there.copy_(stage)

    def abort(self) -> None:
        with self._looking:
            self._aborted = True
            if self._communicator is not None:
                self._communicator.abort()

    def _of(self, stage: Tensor) -> tuple[int, int, int]:
        return stage.data_ptr(), stage.numel(), self._nccl.NCCL_UINT8

    def _finish(self) -> None:
        """Until what was queued is done; an aborted communicator is an error here."""
        done = self._stream.record_event()
        while True:
            ended = done.query()
            with self._looking:
                if self._aborted:
                    raise RuntimeError("aborted")
                self._communicator.check_async_error()
            if ended:
                return
            time.sleep(POLL_S)


class _Thread:
    """Makes calls that may never return, one after another."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        threading.Thread(target=self._work, name=f"nccl {name}", daemon=True).start()

    def run(self, call: Callable[[], Result]) -> Future[Result]:
        answer: Future[Result] = Future()
        self._calls.put((call, answer))
        return answer

    def end(self) -> None:
        self._calls.put(None)

    def _work(self) -> None:
        while (asked := self._calls.get()) is not None:
            call, answer = asked
            try:
                answer.set_result(call())
            except BaseException as error:
                answer.set_exception(error)


def _library() -> Any:
    """`cupy.cuda.nccl`."""
    try:
        nccl = importlib.import_module("cupy.cuda.nccl")
        return nccl if nccl.available else _missing(None)
    except ImportError as error:
        return _missing(error)


def _missing(error: ImportError | None) -> Any:
    raise ConfigError(
        "learner.publish_through nccl needs CuPy 14 or newer and NCCL where learner, workers and evaluator "
        "run: pip install 'dgpo-cluster[nccl]' (for a torch of CUDA 12 cupy-cuda12x in its place)"
    ) from error
