"""How varied images of words are: colours, placement and glyph size, beside the score.

Promises
- Every number is a standard deviation, 0 for images that are all alike: colours on a scale of 0..255,
  places and sizes in pixels. Comparable before and after training when prompts and seeds are the same.
- Needs numpy alone and no reader: a millisecond an image at most.

A reward that only asks whether a word can be read does not mind if all images get the same colours; these
numbers fall when that happens.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

INK_SHARE: Final = 0.03
"""Share of an image, its most contrasting pixels, whose distance from the background counts as full ink."""


class Look(NamedTuple):
    """What a word looks like in each of N images."""

    background: NDArray[np.float64]
    """(N, 3) RGB, 0..255."""
    text: NDArray[np.float64]
    """(N, 3) RGB of the inner pixels of the strokes, 0..255."""
    placement: NDArray[np.float64]
    """(N, 2) centre of the ink, x and y in pixels."""
    glyph_size: NDArray[np.float64]
    """(N, 1) height of the ink in pixels."""


def diversity(images: NDArray[np.uint8], group_size: int = 1) -> dict[str, float]:
    """Standard deviations of each part of `Look`, root mean square over its components.

    Args:
        images: (prompts * group_size, H, W, 3) RGB, the images of one prompt next to each other.

    Returns:
        `<part>_across`: between images of different prompts, averaged over the places in the group.
        `<part>_within`: between images of one prompt, averaged over prompts; only for groups of 2 or more.
    """
    if len(images) == 0 or len(images) % group_size:
        raise ValueError(f"{len(images)} images are no whole number of groups of {group_size}")
    measured: dict[str, float] = {}
    for part, values in look(images)._asdict().items():
        grouped = values.reshape(-1, group_size, values.shape[-1])
        measured[f"{part}_across"] = _deviation(grouped, axis=0)
        if group_size > 1:
            measured[f"{part}_within"] = _deviation(grouped, axis=1)
    return measured


def look(images: NDArray[np.uint8]) -> Look:
    """Take each image apart into background and ink.

    The background is the median colour, as text covers less than half; ink is what is more than half as far
    from it as the most contrasting pixels are.
    """
    pixels = images.astype(np.float64)
    count, height, width, _ = pixels.shape
    background = np.median(pixels, axis=(1, 2))
    distance = np.linalg.norm(pixels - background[:, None, None, :], axis=-1)
    full = np.quantile(distance.reshape(count, -1), 1 - INK_SHARE, axis=1)[:, None, None]
    # An image of one colour has no ink: all of it counts then, which puts the centre in the middle.
    ink = (distance > 0.5 * full) | (full == 0)
    core = (distance >= full).astype(np.float64)
    text = np.einsum("nhw,nhwc->nc", core, pixels) / core.sum(axis=(1, 2))[:, None]
    mass = ink.sum(axis=(1, 2)).astype(np.float64)
    center_x = ink.sum(axis=1) @ np.arange(width) / mass
    center_y = ink.sum(axis=2) @ np.arange(height) / mass
    # A row counts when it holds more than stray pixels.
    rows = ink.sum(axis=2) >= 3
    first, last = rows.argmax(axis=1), height - 1 - rows[:, ::-1].argmax(axis=1)
    extent = np.where(rows.any(axis=1), last - first + 1, 0).astype(np.float64)
    return Look(background, text, np.stack([center_x, center_y], axis=-1), extent[:, None])


def _deviation(grouped: NDArray[np.float64], axis: int) -> float:
    """Root mean square over components of the standard deviation along `axis`, then the mean over groups."""
    deviations = np.sqrt(grouped.var(axis=axis).mean(axis=-1))
    return float(deviations.mean())
