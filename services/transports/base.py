"""What a transport is."""

from __future__ import annotations

from typing import Final, Protocol

from services.messages import WeightsAnnouncement
from services.safetensors_layout import Bytes

DEADLINE_S: Final = 180.0
"""Of every wait for another process; covers the start of the store's actor too."""
KEPT_BUFFER_BYTES: Final = 256 * 1024**2
"""Of a payload that was sent, for the next one."""


class WeightsTransport(Protocol):
    """How the bytes of a version travel."""

    def reclaim(self, kind: str) -> Bytes | None:
        """Memory that the next version of a kind may be written to. What was sent last may then not be
        received any more."""
        ...

    def send(self, announcement: WeightsAnnouncement, payload: Bytes) -> None:
        """Returns when they can be received. The payload is the transport's until it is reclaimed."""
        ...

    def receive(self, announcement: WeightsAnnouncement) -> Bytes | None:
        """None if nobody has them any more.

        Raises:
            TimeoutError: who has them did not hand them over in time.
        """
        ...

    def close(self) -> None:
        """The publisher has ended well; what it sent need not be received any more."""
        ...


class Reused:
    """Payloads that were copied when they were sent: small ones are written to again, since fresh pages cost
    more than the copy."""

    def __init__(self) -> None:
        self._buffers: dict[str, Bytes] = {}

    def reclaim(self, kind: str) -> Bytes | None:
        return self._buffers.pop(kind, None)

    def _copied(self, kind: str, payload: Bytes) -> None:
        if payload.size <= KEPT_BUFFER_BYTES:
            self._buffers[kind] = payload
