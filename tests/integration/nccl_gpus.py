"""Where NCCL itself can be tested."""

from __future__ import annotations

import importlib
import os
from typing import Final

import pytest
import torch

MULTI_RANK: Final = 23000
"""NCCL 2.30, the first that can be told to join two ranks on one GPU."""


def gpus_to_join() -> list[int]:
    """Two GPUs; one twice, where there is no other and NCCL can do that; none where NCCL cannot run."""
    count = torch.cuda.device_count()
    try:
        nccl = importlib.import_module("cupy.cuda.nccl")
    except ImportError:
        return []
    if count == 1 and nccl.available and nccl.get_version() >= MULTI_RANK:
        # Processes started later have it too.
        os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
        return [0, 0]
    return [0, 1] if count > 1 and nccl.available else []


needs_nccl = pytest.mark.skipif(
    not gpus_to_join(),
    reason="needs CuPy (pip install 'dgpo-cluster[nccl]') and two GPUs, or one and NCCL 2.30 or newer",
)
