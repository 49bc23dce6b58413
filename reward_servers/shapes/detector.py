"""Finds coloured shapes on a plain background, from pixels alone: segments them, names shape and colour.

Promises
- Each image is looked at by itself, in float arithmetic of fixed order: the same image, the same objects.
- Finds nothing where there is no plain background (noise, textures, lines across the image), where a blob
  resembles no shape or has no even colour, and where there are more than `MAX_OBJECTS` blobs.

How: the background is the median of the outermost pixels; what differs from it falls into connected blobs;
a blob's colour is that of its fullest pixels, and how far each of its pixels lies on the way from background
to that colour is its coverage. Coverage is moved and scaled to a common centre and area and compared with
every shape by soft intersection over union, sum(min) / sum(max).
"""

from __future__ import annotations

from functools import cache
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from reward_servers.geneval.rules import Detection
from reward_servers.shapes.drawing import coverage
from reward_servers.shapes.outlines import PALETTE, SHAPES

MAX_OBJECTS: Final = 6
"""More blobs than that are a pattern, not objects."""
MIN_LIKENESS: Final = 0.78
"""Least intersection over union of a blob with the shape it is named after."""
MIN_CONTRAST: Final = 60.0
"""Least distance of an object's colour from the background, of 441."""
MIN_AREA: Final = 12.0
"""Pixels that an object covers at least."""
MIN_PLAIN: Final = 0.85
"""Share of the outermost pixels that must have the background's colour."""
PLAIN_DISTANCE: Final = 36.0
"""How far a pixel of the background may be from its median."""
MAX_COLOUR_DISTANCE: Final = 90.0
"""How far an object's colour may be from the one it is named after."""
MAX_UNEVENNESS: Final = 30.0
"""Root mean square distance of an object's fullest pixels from their median."""

_SIDE: Final = 28
_TEMPLATE_AREA: Final = 200.0
_TEMPLATE_SIZES: Final = (8.0, 10.0, 13.0, 17.0)
_CORE_SHARE: Final = 0.4
"""Of a blob's pixels, those that tell its colour."""


def find_shapes(image: NDArray[np.uint8]) -> list[Detection]:
    """The objects in an image.

    Args:
        image: (H, W, 3) RGB.

    Returns:
        Detections with their likeness as score, colours named, boxes to the pixel; most alike first.
    """
    pixels = image.astype(np.float32)
    background = _background(pixels)
    if background is None:
        return []
    distance = np.linalg.norm(pixels - background, axis=-1)
    foreground = (distance > MIN_CONTRAST / 2).astype(np.uint8)
    count, labels, statistics, _ = cv2.connectedComponentsWithStats(foreground, connectivity=4)
    blobs = [blob for blob in range(1, count) if statistics[blob, cv2.CC_STAT_AREA] >= MIN_AREA / 2]
    if len(blobs) > MAX_OBJECTS:
        return []
    found = [_named(pixels, background, distance, labels == blob) for blob in blobs]
    return sorted((d for d in found if d is not None), key=lambda d: -d.score)


def _background(pixels: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """The colour of the outermost pixels; None where they have no common one."""
    edge = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    median = np.median(edge, axis=0).astype(np.float32)
    plain = np.linalg.norm(edge - median, axis=-1) < PLAIN_DISTANCE
    return median if plain.mean() >= MIN_PLAIN else None


def _named(
    pixels: NDArray[np.float32],
    background: NDArray[np.float32],
    distance: NDArray[np.float32],
    blob: NDArray[np.bool_],
) -> Detection | None:
    inside = np.sort(distance[blob])
    fullest = blob & (distance >= inside[int(len(inside) * (1 - _CORE_SHARE))])
    core = np.median(pixels[fullest], axis=0)
    way = core - background
    if np.linalg.norm(way) < MIN_CONTRAST:
        return None
    if np.sqrt(np.square(pixels[fullest] - core).sum(axis=-1).mean()) > MAX_UNEVENNESS:
        return None
    colour, off = _colour(core)
    if off > MAX_COLOUR_DISTANCE:
        return None
    # Half covered pixels around the blob belong to it too.
    around = cv2.dilate(blob.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(np.float32)
    covered = np.clip((pixels - background) @ way / np.square(way).sum(), 0, 1).astype(np.float32) * around
    if covered.sum() < MIN_AREA:
        return None
    likeness = _likeness(_normalised(covered))
    best = int(likeness.argmax())
    if likeness[best] < MIN_LIKENESS:
        return None
    rows, columns = np.flatnonzero(blob.any(axis=1)), np.flatnonzero(blob.any(axis=0))
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return Detection(SHAPES[best], float(likeness[best]), box, colour)


def _colour(seen: NDArray[np.floating]) -> tuple[str, float]:
    """The nearest colour of the palette, and how far it is."""
    away = np.linalg.norm(np.array(list(PALETTE.values()), np.float32) - seen, axis=-1)
    return list(PALETTE)[int(away.argmin())], float(away.min())


def _normalised(covered: NDArray[np.float32]) -> NDArray[np.float32]:
    """Coverage moved to the middle of a (_SIDE, _SIDE) image and scaled to `_TEMPLATE_AREA`."""
    area = covered.sum()
    x = float((covered.sum(axis=0) @ np.arange(covered.shape[1])) / area)
    y = float((covered.sum(axis=1) @ np.arange(covered.shape[0])) / area)
    scale = float(np.sqrt(_TEMPLATE_AREA / area))
    middle = (_SIDE - 1) / 2
    matrix = np.array([[scale, 0, middle - scale * x], [0, scale, middle - scale * y]], np.float32)
    moved: NDArray[np.float32] = cv2.warpAffine(covered, matrix, (_SIDE, _SIDE), flags=cv2.INTER_LINEAR)
    return moved


def _likeness(normalised: NDArray[np.float32]) -> NDArray[np.float32]:
    """(shapes,) soft intersection over union, the best over the sizes of a shape's templates."""
    both = np.minimum(_templates(), normalised).sum(axis=(-1, -2))
    either = np.maximum(_templates(), normalised).sum(axis=(-1, -2))
    likeness: NDArray[np.float32] = (both / either).max(axis=1)
    return likeness


@cache
def _templates() -> NDArray[np.float32]:
    """(shapes, sizes, _SIDE, _SIDE): small ones are as blurred by pixels as small objects are."""
    drawn = [
        [_normalised(coverage(shape, (16.0, 16.0), size, (32, 32))) for size in _TEMPLATE_SIZES]
        for shape in SHAPES
    ]
    return np.array(drawn, np.float32)
