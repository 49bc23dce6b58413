"""A model whose weights are a pickle: whole, and loaded by whoever unpickles."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

NAMES = {"model": "pytorch_model"}
"""File of transformers -> that of the same weights pickled; diffusers' differ in their suffix alone."""


def pickle_weights(folder: Path) -> None:
    """Put .bin files in place of all .safetensors files."""
    for file in folder.glob("*.safetensors"):
        torch.save(load_file(file), file.with_name(f"{NAMES.get(file.stem, file.stem)}.bin"))
        file.unlink()
