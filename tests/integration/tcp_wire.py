"""TCP in the place of NCCL, where there are no GPUs."""

from __future__ import annotations

import socket
from typing import Any

import torch
from torch import Tensor


class TcpWire:
    """Joins two over loopback. Like NCCL it waits for ever, until it is aborted."""

    def __init__(self) -> None:
        self._server: socket.socket | None = None
        self._socket: socket.socket | None = None

    def unique(self) -> bytes:
        self._server = socket.create_server(("127.0.0.1", 0))
        return str(self._server.getsockname()[1]).encode()

    def join(self, unique: bytes, rank: int) -> None:
        if rank == 0:
            assert self._server is not None
            self._socket = self._server.accept()[0]
        else:
            self._socket = socket.create_connection(("127.0.0.1", int(unique)))

    def send(self, tensor: Tensor, peer: int) -> None:
        self._whole(lambda view: self._open.send(view), tensor)

    def receive(self, tensor: Tensor, peer: int) -> None:
        self._whole(lambda view: self._open.recv_into(view), tensor)

    def abort(self) -> None:
        for one in (self._socket, self._server):
            if one is not None:
                try:
                    one.shutdown(socket.SHUT_RDWR)
                except OSError:
                    one.close()

    @property
    def _open(self) -> socket.socket:
        assert self._socket is not None
        return self._socket

    def _whole(self, move: Any, tensor: Tensor) -> None:
        left = memoryview(tensor.view(torch.uint8).numpy())
        try:
            while left:
                moved = move(left)
                if not moved:
                    raise RuntimeError("the other side is gone\nand what NCCL would say of it")
                left = left[moved:]
        except OSError as error:
            raise RuntimeError(str(error)) from error
