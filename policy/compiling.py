"""The blocks of a denoiser through torch.compile: each kind is compiled once and serves all blocks of it.

Promises
- Parameters keep their names and identity; installs, adapters switched off and other tensors in their place
  are seen by the compiled code.
- Code that cannot be compiled whole, or needs more variants than are kept, raises: nothing falls back to slow
  code unseen.
- What was compiled is kept on disk, so that a process that starts again, or beside others, compiles nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import torch
from torch import nn

from policy.errors import PolicyError

VARIANTS: Final = 64
"""Of one kind of block: shapes, with and without gradients, adapters on and off."""
PLACE: Final = Path("~/.cache/dgpo-cluster/compiled")
"""Unless TORCHINDUCTOR_CACHE_DIR names another. It holds code that is run: nobody else may write there."""


def compile_on_gpu(denoiser: nn.Module, device: torch.device) -> None:
    """`compile_blocks`, unless the device is a CPU: nothing is gained there."""
    if device.type != "cpu":
        compile_blocks(denoiser)


def compile_blocks(denoiser: nn.Module) -> None:
    """Compile every repeated block in place, when it is first called with inputs of a new kind.

    Raises:
        PolicyError: the model has no such blocks.
    """
    # diffusers names them for one purpose or the other, according to the model.
    attributes = ("_repeated_blocks", "_no_split_modules")
    kinds = next((set(found) for name in attributes if (found := getattr(denoiser, name, None))), set())
    blocks = [module for module in denoiser.modules() if type(module).__name__ in kinds]
    if not blocks:
        kind = type(denoiser).__name__
        raise PolicyError(f"model.compile: a {kind} has no repeated blocks; set it to false")
    place = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(PLACE.expanduser()))
    Path(place).mkdir(parents=True, exist_ok=True, mode=0o700)
    # Here: importing it takes seconds.
    import torch._dynamo.config as limits

    limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
    for block in blocks:
        block.compile(fullgraph=True)
