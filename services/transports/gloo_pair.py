"""Over torch's process groups of two (Gloo): from host memory to host memory, by TCP.

Not by Ray's collectives, which over Gloo take the process's default group: on a learner that is the one of
its ranks.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import RayError
from torch import Tensor

from services.transports.pair import Broken, Members, Pair, first_line


class GlooPair(Pair):
    """See the module and `Pair`."""

    def __init__(self, store: Any, name: str, *, rank: int, deadline_s: float) -> None:
        super().__init__(store, name, rank=rank, deadline_s=deadline_s)
        self._deadline = timedelta(seconds=deadline_s)
        gloo: Any = dist.ProcessGroupGloo
        # Kept: the group refers to it, but does not keep its Python half alive.
        self._torch_store = _TorchStore(self._members)
        try:
            options = gloo._Options()
            options._timeout = self._deadline
            # Where Ray's own connections are: loopback, unless the cluster has several nodes.
            options._devices = [gloo.create_device(hostname=ray.util.get_node_ip_address())]
            self._group: Any = gloo(self._torch_store, rank, 2, options)
        except (RuntimeError, TimeoutError, RayError) as error:
            self._forget()
            raise Broken(str(error)) from error

    def close(self) -> None:
        self._group.abort()
        self._forget()

    def _send(self, tensor: Tensor) -> None:
        self._travel(self._group.send, tensor)

    def _receive(self, tensor: Tensor) -> None:
        self._travel(self._group.recv, tensor)

    def _travel(self, go: Any, tensor: Tensor) -> None:
        try:
            go([tensor], self._peer, 0).wait(self._deadline)
        except RuntimeError as error:
            raise Broken(first_line(error)) from error


_Store: Any = getattr(dist, "Store")  # noqa: B009 - torch's stubs do not have it


class _TorchStore(_Store):  # type: ignore[misc]
    """`Members` as torch asks for them."""

    def __init__(self, members: Members) -> None:
        super().__init__()
        self._members = members

    def set(self, key: str, value: bytes | str) -> None:
        self._members.set(key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        return self._members.get(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)
