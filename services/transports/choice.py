"""The transport that a run has chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from services.config import Config
from services.transports.base import WeightsTransport
from services.transports.object_store import ObjectStoreTransport
from services.transports.shared_directory import SharedDirectoryTransport


def open_transport(config: Config, run_directory: Path, store: Any) -> WeightsTransport:
    """`learner.publish_through`, in the thread in which the model is loaded.

    Args:
        store: handle of the PolicyStore actor.

    Raises:
        ConfigError: this process has not what it takes.
    """
    # What only some of them need is not imported for nothing.
    match config.learner.publish_through:
        case "shared_directory":
            return SharedDirectoryTransport(run_directory)
        case "process_groups":
            from services.transports.gloo_pair import GlooPair
            from services.transports.pairs import PairsTransport

            return PairsTransport(store, GlooPair)
        case "nccl":
            from policy.loading import find_device
            from services.transports.nccl_pair import nccl_pairs
            from services.transports.pairs import PairsTransport

            return PairsTransport(store, nccl_pairs(find_device(config.model.device)))
        case _:
            return ObjectStoreTransport(store)
