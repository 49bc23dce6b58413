"""What a server speaks that was reached and not understood: the queue's port and Ray's are mixed up easily.

Sends one line that holds nothing secret: every server without TLS answers it in its own way.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Literal

Spoken = Literal["redis", "grpc", "http"]

OWN_PORT = "give the queue a port of its own, 6380 as in deploy/redis/redis.conf"
_SETTINGS = 4
"""Type of the frame that a server of HTTP/2 says first, in its fourth byte."""


def spoken(host: str, port: int, look_s: float) -> Spoken | None:
    """What answers there; None: nothing does, or nothing known."""
    with suppress(OSError), socket.create_connection((host, port), look_s) as connection:
        connection.sendall(b"PING\r\n")
        said = connection.recv(64)
        if said[:1] in (b"+", b"-"):
            return "redis"
        if said.startswith(b"HTTP/1"):
            return "http"
        # Three bytes of length, then the type.
        if len(said) > 3 and said[0] == 0 and said[3] == _SETTINGS:
            return "grpc"
    return None
