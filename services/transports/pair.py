"""A connection of two: the publisher of weights, and one of their receivers."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import numpy as np
import ray
import torch
from torch import Tensor

from services.safetensors_layout import Bytes

CHUNK_BYTES: Final = 64 * 1024**2
CONNECT_S: Final = 15.0
"""For the other side to come, once both know of each other."""
GRACE_S: Final = 10.0
"""For an answer of the store's actor, beyond what it was asked to wait."""


class Broken(RuntimeError):
    """The other side of a connection is gone, or too slow."""


def first_line(error: Exception) -> str:
    """What it says, without a stack of C++; its kind, if it says nothing."""
    return str(error).partition("\n")[0] or type(error).__name__


class Pair(ABC):
    """What both ends have, whatever they talk over. The publisher is rank 0, the receiver rank 1.

    Args:
        store: handle of the PolicyStore actor, through which the two find each other.
        name: of the connection; both ends have the same.

    Raises:
        Broken: the other side did not come.
    """

    def __init__(self, store: Any, name: str, *, rank: int, deadline_s: float) -> None:
        self.name, self.used = name, time.monotonic()
        self._peer, self._deadline_s = 1 - rank, deadline_s
        self._one_at_a_time = threading.Lock()
        self._members = Members(store, name)
        self._forget = partial(store.forget.remote, name)

    def send(self, payload: Bytes | None) -> None:
        """Its size first; of None, that there is nothing."""
        self.used = time.monotonic()
        size = torch.tensor([0 if payload is None else payload.size])
        with self._one_at_a_time:
            self._send(size)
            for chunk in _chunks(payload):
                self._send(chunk)

    def receive(self, expected: int) -> Bytes | None:
        """So many bytes, or None.

        Raises:
            Broken: the other side is gone, or sends something else.
        """
        size = torch.zeros(1, dtype=torch.int64)
        with self._one_at_a_time:
            self._receive(size)
            if int(size) not in (0, expected):
                raise Broken(f"{int(size)} bytes are sent, {expected} were announced")
            payload = np.empty(expected, dtype=np.uint8) if size else None
            for chunk in _chunks(payload):
                self._receive(chunk)
        return payload

    @abstractmethod
    def close(self) -> None:
        """Whoever waits on either side does not any more."""

    @abstractmethod
    def _send(self, tensor: Tensor) -> None:
        """In host memory. Raises `Broken`, as `_receive` does."""

    @abstractmethod
    def _receive(self, tensor: Tensor) -> None: ...


class Members:
    """What the two ends find each other by, kept by the PolicyStore actor: no port is opened for it.

    Raises:
        RayError: the actor is gone.
    """

    def __init__(self, store: Any, connection: str) -> None:
        self._store, self._connection = store, connection

    def set(self, key: str, value: bytes) -> None:
        ray.get(self._store.set_value.remote(f"{self._connection}/{key}", value), timeout=CONNECT_S)

    def get(self, key: str) -> bytes:
        """Raises `TimeoutError` when the other side does not come."""
        told = self._store.value.remote(f"{self._connection}/{key}", CONNECT_S)
        found: bytes | None = ray.get(told, timeout=CONNECT_S + GRACE_S)
        if found is None:
            raise TimeoutError(f"the other side did not come within {CONNECT_S:g} s")
        return found


def _chunks(payload: Bytes | None) -> Iterator[Tensor]:
    if payload is not None:
        yield from torch.from_numpy(payload).split(CHUNK_BYTES)  # type: ignore[no-untyped-call]
