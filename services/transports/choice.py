"""The transport that a run has chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from services.config import Config
from services.transports.base import WeightsTransport
from services.transports.object_store import ObjectStoreTransport
from services.transports.shared_directory import SharedDirectoryTransport


def open_transport(config: Config, run_directory: Path, store: Any) -> WeightsTransport:
    """`learner.publish_through`.

    Args:
        store: handle of the PolicyStore actor.
    """
    match config.learner.publish_through:
        case "shared_directory":
            return SharedDirectoryTransport(run_directory)
        case "process_groups":
            # Here: torch.distributed is not imported for nothing.
            from services.transports.process_groups import ProcessGroupsTransport

            return ProcessGroupsTransport(store)
        case _:
            return ObjectStoreTransport(store)
