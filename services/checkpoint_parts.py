"""A part of a checkpoint (policy, ema, ...): a file, or a directory of what each rank has written.

Both are safetensors. In a directory they are those of torch.distributed.checkpoint: each file has some rows
of every tensor and says which; nothing is pickled. learner/checkpoint.py says when a checkpoint is whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
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
        OSError: there is no such directory.
    """
    found = _reader(folder / part).read_metadata().state_dict_metadata
    if not found:
        raise FileNotFoundError(f"{folder / part}: no {SUFFIX} files")
    return {name: (entry.size, entry.properties.dtype) for name, entry in found.items()}


def load_into(directory: Path, tensors: dict[str, Any]) -> None:
    """Fill tensors, whole ones or a rank's rows (DTensor), from a directory."""
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        # It says that it takes us to mean what we ask for.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        load(tensors, storage_reader=_reader(directory), no_dist=True)


def files_of(directory: Path) -> Iterable[Path]:
    return sorted(directory.glob(f"*{SUFFIX}"))


def _reader(directory: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    return HuggingFaceStorageReader(str(directory))
