"""What two GPUs are joined by: an NCCL communicator of two, which sends bytes of host memory. Without Ray."""

from __future__ import annotations

import threading
import time
from typing import Any, Final, Protocol

import torch
from torch import Tensor

POLL_S: Final = 0.0005


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
