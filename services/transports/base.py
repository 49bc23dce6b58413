"""What a transport is."""

from __future__ import annotations

from typing import Protocol

from services.messages import WeightsAnnouncement
from services.safetensors_layout import Bytes

DEADLINE_S = 180.0
"""Of every wait for another process; covers the start of the store's actor too."""


class WeightsTransport(Protocol):
    """How the bytes of a version travel."""

    keeps_payload: bool
    """Whether what was given to `send` must stay as it is until it is reclaimed."""

    def send(self, announcement: WeightsAnnouncement, payload: Bytes) -> None:
        """Returns when they can be received; `payload` may be overwritten afterwards, unless it is kept."""
        ...

    def reclaim(self, kind: str) -> Bytes | None:
        """What was sent last of a kind, to be written over: from now on nobody receives it. None: it is not
        kept."""
        ...

    def receive(self, announcement: WeightsAnnouncement) -> Bytes | None:
        """None if nobody has them any more.

        Raises:
            TimeoutError: who has them did not hand them over in time.
        """
        ...

    def close(self) -> None:
        """The publisher ends; what it sent need not be received any more."""
        ...
