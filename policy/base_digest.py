"""A digest of a base model's denoiser: how a LoRA tells the base that it was trained on from any other.

Promises
- The same weights have the same digest in float32 and in bfloat16, in one file or in shards, on any device,
  and with adapters on them.
- It costs next to nothing beside loading them: of each tensor the first values alone are looked at. Training
  of any kind changes some of those; a change of a few values elsewhere is not seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
import xxhash
from torch import Tensor

from policy.component_files import DENOISER_FILE, check_weights
from policy.errors import PolicyError
from policy.registry import read_family
from services.config import ModelConfig
from services.config_file import find
from services.safetensors_layout import BadLayout, tensor_bytes, views

VALUES: Final = 4096
"""Of each tensor."""


def base_digest(state: Mapping[str, Tensor]) -> str:
    """Of a denoiser's state, with adapters or without."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted((name.replace(".base_layer.", "."), it) for name, it in state.items()):
        if ".lora_" not in name:
            first = tensor.detach().reshape(-1)[:VALUES].to(torch.bfloat16)
            digest.update(f"{name}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor_bytes(first).data)
    return digest.hexdigest()


def base_digest_of_files(config: ModelConfig) -> str | None:
    """Of the model that a configuration names; None, of one that is not in a directory here.

    Raises:
        PolicyError: there is no model in it, or one that is not whole.
    """
    directory = find(config.path)
    if not directory.is_dir():
        return None
    name = read_family(config)[0].parts.denoiser
    told, state = f"model.path {directory}: the {name}", dict[str, Tensor]()
    found = check_weights(told, directory / name, DENOISER_FILE)
    for file in found.headers:
        try:
            # What nobody looks at is not read.
            state |= views(np.memmap(file, dtype=np.uint8, mode="r"))
        except BadLayout as error:
            raise PolicyError(f"{told} cannot be read: {file}: {error}") from error
    # Of shards what the index does not name is not loaded either.
    return base_digest({weight: state[weight] for weight in found.listed or state})
