"""A part of a checkpoint (policy, ema, ...): a file, or a directory of what each rank has written.

Both are safetensors. In a directory they are those of torch.distributed.checkpoint: each file has some rows
of every tensor and says which; nothing is pickled. learner/checkpoint.py says when a checkpoint is whole.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SUFFIX = ".safetensors"


def part_of(file: str) -> str:
    """The part that a file of a checkpoint belongs to.

    >>> part_of("policy.safetensors"), part_of("ema/shard-00001-model-00001-of-00001.safetensors")
    ('policy', 'ema')
    """
    return PurePosixPath(file).parts[0].removesuffix(SUFFIX)


def read_part(folder: Path, part: str) -> dict[str, Tensor]:
    """The whole tensors of a part, on the CPU.

    Raises:
        OSError: there is no such part.
    """
    file = folder / f"{part}{SUFFIX}"
    if file.is_file():
        return load_file(file)
    described = shapes_of_part(folder, part)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in described.items()}
    load_into(folder / part, tensors)
    return tensors


def shapes_of_part(folder: Path, part: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The tensors of a part that is a directory.

    Raises:
        OSError: there is no such directory, or not all rows of a tensor are in it.
    """
    try:
        found = _reader(folder / part).read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise OSError(f"{folder / part}: cannot be read: {error}") from error
    if not found:
        raise FileNotFoundError(f"{folder / part}: no {SUFFIX} files")
    for name, entry in found.items():
        # Torch takes what is there, and leaves the other rows of a tensor as they were.
        there, whole = sum(math.prod(chunk.sizes) for chunk in entry.chunks), math.prod(entry.size)
        if there != whole:
            raise OSError(f"{folder / part}: {there} of the {whole} numbers of {name}: rows are missing")
    return {name: (entry.size, entry.properties.dtype) for name, entry in found.items()}


def load_into(directory: Path, tensors: dict[str, Any]) -> None:
    """Fill tensors, whole ones or a rank's rows (DTensor), from a directory.

    Raises:
        OSError: they cannot be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        # It says that it takes us to mean what we ask for.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            load(tensors, storage_reader=_reader(directory), no_dist=True)
        # No Exception: it would pass whoever handles those.
        except CheckpointException as error:
            raise OSError(f"{directory}: rows cannot be read: {error}") from error


def digest_of(sha256s: Sequence[str]) -> str:
    """Of a part, from those of its files in the order of their names; hex."""
    if len(sha256s) == 1:
        return sha256s[0]
    return hashlib.sha256("".join(sha256s).encode()).hexdigest()


def digest_of_part(folder: Path, part: str) -> str:
    """The same, of the files as they are now.

    Raises:
        OSError: there is no such part.
    """
    file = folder / f"{part}{SUFFIX}"
    files = [file] if file.is_file() else files_of(folder / part)
    if not files:
        raise FileNotFoundError(f"{folder / part}: no {SUFFIX} files")
    return digest_of([sha256_of(path) for path in files])


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_of(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"*{SUFFIX}"))


def _reader(directory: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    return HuggingFaceStorageReader(str(directory))
