"""Weights by version: from the learner to every worker (services/transports), proven at arrival.

Promises
- `publish` returns once the bytes can be fetched; announcing them is the queue's business.
- `fetch` returns and `install` binds exactly the tensors that were published, or raises: `WeightsMismatch`
  when their number or digest differs, `WeightsGone` when nobody has them any more.
- When the learner is gone, and what it has sent with it, `fetch` reads the run directory's checkpoint of that
  step, and takes the file whose digest is the announced one.
- Every wait has a deadline.

Fetched tensors may share memory with the object store: nobody may write to them.
With services/transports and the driver, all of `services` that knows Ray.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.checkpoint_parts import SUFFIX, read_part
from services.codec import WeightsEncoder, decode_weights, weights_digest
from services.messages import PolicyVersion, WeightsAnnouncement
from services.safetensors_layout import ALIGNMENT_BYTES, BadLayout, Bytes
from services.transports.base import WeightsTransport
from services.transports.rendezvous import Rendezvous

KEPT_VERSIONS = 4
"""Of each kind; a worker asks for the newest, so it may lag this many updates behind between asking and
fetching."""

log = logging.getLogger(__name__)


class WeightsMismatch(RuntimeError):
    """What arrived is not what was published."""


class WeightsGone(RuntimeError):
    """Nobody has these weights any more; a newer version will be announced."""


class PolicyStore(Rendezvous):
    """The body of the actor that knows who has which version. The driver owns it.

    References are handed over inside lists, so that Ray passes the reference and not the bytes.
    """

    def __init__(self, kept_versions: int = KEPT_VERSIONS) -> None:
        super().__init__()
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


def publish(
    transport: WeightsTransport,
    tensors: Mapping[str, torch.Tensor],
    version: PolicyVersion,
    *,
    kind: str = "policy",
    dtype: torch.dtype | None = None,
    probe: tuple[float, ...] | None = None,
) -> WeightsAnnouncement:
    """Make weights fetchable.

    Args:
        tensors: name -> tensor on any device.
        dtype: in which they travel; None: their own.
        probe: the velocity with these tensors (policy/probe.py).

    Returns:
        What to announce (GroupQueue.commit, GroupQueue.announce).
    """
    like = {name: torch.empty_like(tensor, dtype=dtype, device="meta") for name, tensor in tensors.items()}
    whole = ((name, [tensor]) for name, tensor in tensors.items())
    return publish_rows(
        transport, like, whole, version, kind=kind, probe=probe, buffer=transport.reclaim(kind)
    )


def publish_rows(
    transport: WeightsTransport,
    like: Mapping[str, torch.Tensor],
    rows: Iterable[tuple[str, Sequence[torch.Tensor]]],
    version: PolicyVersion,
    *,
    kind: str,
    probe: tuple[float, ...] | None = None,
    buffer: Bytes | None,
) -> WeightsAnnouncement:
    """The same, of weights that come one after another, each in pieces of some rows (services/codec.py
    `WeightsEncoder`).

    Args:
        buffer: reclaimed from the transport, beforehand.
    """
    encoder = WeightsEncoder(like, buffer)
    for name, pieces in rows:
        encoder.write(name, pieces)
    payload, digest = encoder.finish()
    announcement = WeightsAnnouncement.model_validate(
        {
            "version": version,
            "kind": kind,
            "digest": digest,
            "tensors": len(like),
            "bytes": payload.size,
            "probe": probe,
        }
    )
    transport.send(announcement, payload)
    return announcement


def fetch(
    transport: WeightsTransport, announcement: WeightsAnnouncement, run_directory: Path | None = None
) -> dict[str, torch.Tensor]:
    """The tensors that were announced, proven.

    Args:
        run_directory: whose `checkpoints/step-N/` is read when the publisher is gone.

    Raises:
        WeightsMismatch: number or digest of the tensors differ from the announcement.
        WeightsGone: neither their publisher nor a checkpoint has this version.
        TimeoutError: who has them did not answer.
    """
    return _proven(_receive(transport, announcement, run_directory), announcement)


def install(
    transport: WeightsTransport,
    announcement: WeightsAnnouncement,
    parameters: Mapping[str, torch.Tensor],
    run_directory: Path | None = None,
) -> int:
    """Fetch, prove, and bind to `parameters`, which nobody may write to from then on.

    A parameter on the CPU becomes a view of what was proven, in the memory that all processes of the node
    share; it costs one reading of the bytes, and no memory. One elsewhere, of another dtype or misaligned
    gets a copy.

    Returns:
        How many tensors were bound: all of them.

    Raises:
        WeightsMismatch: names, shapes, number or digest differ; nothing was changed.
        WeightsGone, TimeoutError: as `fetch`; nothing was changed.
    """
    tensors = _receive(transport, announcement, run_directory)
    _check_fit(tensors, announcement, parameters)
    tensors = _proven(tensors, announcement)
    for name, parameter in parameters.items():
        parameter.data = _alike(tensors[name], parameter)
    return len(parameters)


def _alike(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The values of `tensor` as `parameter` has them: device, dtype and alignment.

    Kernels for misaligned memory may add up in another order: results would no longer be the same to the bit.
    """
    if parameter.is_cpu and parameter.dtype == tensor.dtype and tensor.data_ptr() % ALIGNMENT_BYTES == 0:
        return tensor
    return tensor.to(parameter, copy=True)


def _receive(
    transport: WeightsTransport, announcement: WeightsAnnouncement, run_directory: Path | None
) -> dict[str, torch.Tensor]:
    """Readable and of the right number, not yet proven."""
    payload = transport.receive(announcement)
    if payload is not None:
        return _readable(payload, announcement)
    found = _from_checkpoint(run_directory, announcement) if run_directory is not None else None
    if found is None:
        raise WeightsGone(
            f"{_what(announcement)}: nobody has them any more, and no checkpoint of step "
            f"{announcement.version.step} in {run_directory} has their digest"
        )
    return found


def _what(announcement: WeightsAnnouncement) -> str:
    return f"weights {announcement.kind} {announcement.version}"


def _readable(payload: Bytes, announcement: WeightsAnnouncement) -> dict[str, torch.Tensor]:
    try:
        tensors = decode_weights(payload)
    except BadLayout as error:
        raise WeightsMismatch(
            f"{_what(announcement)}: {payload.size} bytes arrived, not readable: {error}"
        ) from error
    if len(tensors) != announcement.tensors:
        raise WeightsMismatch(
            f"{_what(announcement)}: {announcement.tensors} tensors were published, {len(tensors)} arrived"
        )
    return tensors


def _proven(tensors: dict[str, torch.Tensor], announcement: WeightsAnnouncement) -> dict[str, torch.Tensor]:
    _check_digest(weights_digest(tensors), announcement)
    return tensors


def _check_digest(digest: str, announcement: WeightsAnnouncement) -> None:
    if digest != announcement.digest:
        raise WeightsMismatch(
            f"{_what(announcement)}: digest {digest[:16]}... arrived, "
            f"{announcement.digest[:16]}... was published"
        )


def _check_fit(
    tensors: Mapping[str, torch.Tensor],
    announcement: WeightsAnnouncement,
    parameters: Mapping[str, torch.Tensor],
) -> None:
    if tensors.keys() != parameters.keys():
        missing = sorted(parameters.keys() - tensors.keys())[:4]
        unknown = sorted(tensors.keys() - parameters.keys())[:4]
        raise WeightsMismatch(
            f"{_what(announcement)}: {len(tensors)} tensors for {len(parameters)} parameters; "
            f"not published: {missing or 'none'}, not bound: {unknown or 'none'}"
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise WeightsMismatch(
                f"{_what(announcement)}: {name} is {tuple(tensors[name].shape)}, "
                f"the parameter {tuple(parameter.shape)}"
            )


def _from_checkpoint(
    run_directory: Path, announcement: WeightsAnnouncement
) -> dict[str, torch.Tensor] | None:
    folder = run_directory / "checkpoints" / f"step-{announcement.version.step}"
    # Rollouts may run on the EMA reference: then the policy's announcement matches that file's digest.
    for part in (announcement.kind, "reference"):
        try:
            stored = _stored(folder, part, announcement)
        except (OSError, WeightsMismatch):
            continue
        # They may have travelled in another dtype than they are kept in.
        for dtype in (None, torch.bfloat16):
            tensors = {name: tensor.to(dtype) if dtype else tensor for name, tensor in stored.items()}
            if weights_digest(tensors) == announcement.digest:
                return tensors
    return None


def _stored(folder: Path, part: str, announcement: WeightsAnnouncement) -> dict[str, torch.Tensor]:
    file = folder / f"{part}{SUFFIX}"
    if file.is_file():
        return _readable(np.fromfile(file, dtype=np.uint8), announcement)
    return read_part(folder, part)
