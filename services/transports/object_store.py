"""Weights through the Ray object store: one put, reads without a copy on every node that has the object.

Promises
- An object dies with the process that put it: `receive` then returns None.
"""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from services.messages import WeightsAnnouncement
from services.safetensors_layout import Bytes
from services.transports.base import DEADLINE_S, Reused

log = logging.getLogger(__name__)


class ObjectStoreTransport(Reused):
    """See the module.

    Args:
        store: handle of the PolicyStore actor, which knows which object holds which version.
    """

    def __init__(self, store: Any, *, deadline_s: float = DEADLINE_S) -> None:
        super().__init__()
        self._store = store
        self._deadline_s = deadline_s

    def send(self, announcement: WeightsAnnouncement, payload: Bytes) -> None:
        reference = ray.put(payload)
        told = self._store.put.remote(announcement.model_dump_json(), [reference])
        ray.get(told, timeout=self._deadline_s)
        self._copied(announcement.kind, payload)

    def receive(self, announcement: WeightsAnnouncement) -> Bytes | None:
        where = f"{announcement.kind} {announcement.version}"
        try:
            found = ray.get(
                self._store.get.remote(announcement.kind, str(announcement.version)), timeout=self._deadline_s
            )
            if found is None:
                return None
            payload: Bytes = ray.get(found[0], timeout=self._deadline_s)
        except GetTimeoutError as error:
            raise TimeoutError(
                f"weights {where} did not come from the object store within {self._deadline_s:g} s"
            ) from error
        except (ObjectLostError, RayActorError) as error:
            log.warning("weights %s: the object store lost them: %s", where, type(error).__name__)
            return None
        return payload

    def close(self) -> None:
        """Objects end with the process."""
