"""Latents as sequences of 2 x 2 patches, (N, C, h, w) <-> (N, hw/4, 4C): FLUX and Qwen-Image take them so."""

from __future__ import annotations

from torch import Tensor

PATCH = 2
"""Latents of a side that are one token."""


def pack(latents: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, h/2 * w/2, 4C)."""
    samples, channels, height, width = latents.shape
    patches = latents.view(samples, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(samples, -1, channels * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(N, h/2 * w/2, 4C) -> (N, C, h, w).

    Args:
        height: h, of the latents.
        width: w.
    """
    samples, _, channels = tokens.shape
    patches = tokens.view(samples, height // PATCH, width // PATCH, channels // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(samples, channels // PATCH**2, height, width)
