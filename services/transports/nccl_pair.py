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
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, TypeVar

import torch
from ray.exceptions import RayError
from torch import Tensor

from services.config_file import ConfigError
from services.ray_runtime import nccl_listens_where_ray_does
from services.transports.nccl_wire import CardWire, Wire
from services.transports.pair import Broken, Pair, first_line
from services.transports.pairs import Connect

MEET_S: Final = 60.0
"""For NCCL to join two GPUs, once both sides are there."""

Result = TypeVar("Result")


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
