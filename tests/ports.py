"""Ports for servers that must be told theirs, and cannot be handed a socket."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

LOWEST, HIGHEST = 20_000, 32_767
"""Above those that Ray keeps for its workers, and below those that Linux gives to whoever binds port 0:
nobody gets one of these by chance between the choice and the server's own bind."""


def free_ports(count: int) -> list[int]:
    """So many ports of loopback, all different, that nobody listens on."""
    with ExitStack() as held:
        found: list[int] = []
        # Not seeded: sessions of tests beside each other must not choose alike.
        for port in random.SystemRandom().sample(range(LOWEST, HIGHEST + 1), HIGHEST - LOWEST + 1):
            if len(found) == count:
                return found
            try:
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            found.append(port)
    raise AssertionError(f"no {count} free ports from {LOWEST} to {HIGHEST}")
