"""A GPU's kernels that add up in one order, where a run promises the same weights bit for bit.

By themselves the backward kernels of attention add up as their threads come to it, and cuBLAS chooses by what
memory is at hand: two updates from the same state then differ in their last bits.
"""

from __future__ import annotations

import os
from typing import Any, Final

import torch

from services.config import Config

VARIABLE: Final = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE: Final = ":4096:8"
"""32 MiB, as torch takes on a Hopper GPU anyway; read when cuBLAS is first used."""


def wants_one_order(config: Config, device: torch.device) -> bool:
    """Whether the promise is given: at staleness 0, and not with compiled code. A CPU keeps it by itself."""
    return device.type == "cuda" and config.queue.max_staleness == 0 and not config.model.compile


def add_up_in_one_order(*, warn_only: bool = False) -> None:
    """Of this process, from here on, before the GPU is first used.

    Args:
        warn_only: an operation that cannot says so in a warning, for passes without a backward, where few
            are concerned; otherwise it raises RuntimeError and is named in it.
    """
    os.environ.setdefault(VARIABLE, WORKSPACE)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    # No result depends on it, and it writes all new memory twice.
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False
