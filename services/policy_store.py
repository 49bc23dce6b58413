"""Weights by version: from the learner to every worker through the Ray object store, proven at arrival.

Promises
- `publish` returns once the bytes can be fetched; announcing them is the queue's business.
- `fetch` returns exactly the tensors that were published, or raises: `WeightsMismatch` when number or digest
  differ, `WeightsGone` when nobody has them any more. It never returns other weights than those asked for.
- An object dies with the process that put it: when the learner is gone, `fetch` reads the run directory's
  checkpoint of that step, and takes the file whose digest is the announced one.
- Every wait has a deadline.

Fetched tensors share memory with the object store: copy them into parameters, do not write to them.
The only module of `services` beside the driver's that knows Ray.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from services.codec import decode_weights, encode_weights, weights_digest
from services.messages import PolicyVersion, WeightsAnnouncement
from services.safetensors_layout import BadLayout, Bytes

KEPT_VERSIONS = 4
"""Of each kind; a worker asks for the newest, so it may lag this many updates behind between asking and
fetching."""
KEPT_BUFFER_BYTES = 256 * 1024**2
"""A publish buffer up to this size is kept for the next publish: fresh pages cost more than the copy."""
DEADLINE_S = 180.0
"""Covers the start of the store's actor too."""

log = logging.getLogger(__name__)
_buffers: dict[str, Bytes] = {}


class WeightsMismatch(RuntimeError):
    """What arrived is not what was published."""


class WeightsGone(RuntimeError):
    """Nobody has these weights any more; a newer version will be announced."""


class WeightsTransport(Protocol):
    """How the bytes of a version travel. One class a transport."""

    def send(self, announcement: WeightsAnnouncement, payload: Bytes) -> None:
        """Returns when they can be received; `payload` may be overwritten afterwards."""
        ...

    def receive(self, announcement: WeightsAnnouncement) -> Bytes | None:
        """None if nobody has them any more."""
        ...


class PolicyStore:
    """The body of the actor that knows which object holds which version. The driver owns it.

    References are handed over inside lists, so that Ray passes the reference and not the bytes.
    """

    def __init__(self, kept_versions: int = KEPT_VERSIONS) -> None:
        self._kept = kept_versions
        self._objects: dict[str, OrderedDict[str, list[Any]]] = {}

    def put(self, announcement: str, reference: list[Any]) -> None:
        """Remember a version (WeightsAnnouncement as JSON); the oldest of its kind is dropped."""
        told = WeightsAnnouncement.model_validate_json(announcement)
        versions = self._objects.setdefault(told.kind, OrderedDict())
        versions[str(told.version)] = reference
        versions.move_to_end(str(told.version))
        while len(versions) > self._kept:
            versions.popitem(last=False)

    def get(self, kind: str, version: str) -> list[Any] | None:
        """The reference of a version in a list; None if it was dropped or never there."""
        return self._objects.get(kind, OrderedDict()).get(version)

    def versions(self, kind: str) -> list[str]:
        return list(self._objects.get(kind, OrderedDict()))


class ObjectStoreTransport:
    """Through the Ray object store: one put, zero-copy reads on every node that has it."""

    def __init__(self, store: Any, *, deadline_s: float = DEADLINE_S) -> None:
        self._store = store
        self._deadline_s = deadline_s

    def send(self, announcement: WeightsAnnouncement, payload: Bytes) -> None:
        reference = ray.put(payload)
        told = self._store.put.remote(announcement.model_dump_json(), [reference])
        ray.get(told, timeout=self._deadline_s)

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


def publish(
    store: Any, tensors: Mapping[str, torch.Tensor], version: PolicyVersion, *, kind: str = "policy"
) -> WeightsAnnouncement:
    """Make weights fetchable.

    Args:
        store: handle of the PolicyStore actor, or another WeightsTransport.
        tensors: name -> tensor on any device.

    Returns:
        What to announce (GroupQueue.commit, GroupQueue.announce).
    """
    payload = encode_weights(tensors, _buffers.get(kind))
    if payload.size <= KEPT_BUFFER_BYTES:
        _buffers[kind] = payload
    announcement = WeightsAnnouncement.model_validate(
        {
            "version": version,
            "kind": kind,
            "digest": weights_digest(decode_weights(payload)),
            "tensors": len(tensors),
            "bytes": payload.size,
        }
    )
    _transport(store).send(announcement, payload)
    return announcement


def fetch(
    store: Any, announcement: WeightsAnnouncement, run_directory: Path | None = None
) -> dict[str, torch.Tensor]:
    """The tensors that were announced, proven.

    Args:
        store: handle of the PolicyStore actor, or another WeightsTransport.
        run_directory: whose `checkpoints/step-N/` is read when the publisher is gone.

    Raises:
        WeightsMismatch: number or digest of the tensors differ from the announcement.
        WeightsGone: neither the object store nor a checkpoint has this version.
        TimeoutError: the object store did not answer.
    """
    payload = _transport(store).receive(announcement)
    if payload is not None:
        return _proven(payload, announcement)
    found = _from_checkpoint(run_directory, announcement) if run_directory is not None else None
    if found is None:
        raise WeightsGone(
            f"weights {announcement.kind} {announcement.version}: not in the object store any more, and no "
            f"checkpoint of step {announcement.version.step} in {run_directory} has their digest"
        )
    return found


def _transport(store: Any) -> WeightsTransport:
    # Not by duck typing: an actor handle has every attribute that one asks for.
    if isinstance(store, ray.actor.ActorHandle):
        return ObjectStoreTransport(store)
    transport: WeightsTransport = store
    return transport


def _proven(payload: Bytes, announcement: WeightsAnnouncement) -> dict[str, torch.Tensor]:
    what = f"weights {announcement.kind} {announcement.version}"
    try:
        tensors = decode_weights(payload)
    except BadLayout as error:
        raise WeightsMismatch(f"{what}: {payload.size} bytes arrived, not readable: {error}") from error
    if len(tensors) != announcement.tensors:
        raise WeightsMismatch(
            f"{what}: {announcement.tensors} tensors were published, {len(tensors)} arrived"
        )
    digest = weights_digest(tensors)
    if digest != announcement.digest:
        raise WeightsMismatch(
            f"{what}: digest {digest[:16]}... arrived, {announcement.digest[:16]}... was published"
        )
    return tensors


def _from_checkpoint(
    run_directory: Path, announcement: WeightsAnnouncement
) -> dict[str, torch.Tensor] | None:
    folder = run_directory / "checkpoints" / f"step-{announcement.version.step}"
    named = folder / f"{announcement.kind}.safetensors"
    # Rollouts may run on the EMA reference: then the policy's announcement matches another file's digest.
    others = sorted(path for path in folder.glob("*.safetensors") if path != named)
    for path in [named, *others]:
        try:
            return _proven(np.fromfile(path, dtype=np.uint8), announcement)
        except (OSError, WeightsMismatch):
            continue
    return None
