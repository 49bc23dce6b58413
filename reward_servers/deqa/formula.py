"""DeQA-Score's formula and preprocessing, as pure functions of numbers: no torch, no transformers.

    square = the image, padded to a square with the mean colour of CLIP
    pixels = (square resized to 448 x 448, bicubic) / 255, minus CLIP's mean, by its standard deviation
    p      = softmax over the logits of excellent, good, fair, poor and bad as the word after PROMPT
    score  = 5 p(excellent) + 4 p(good) + 3 p(fair) + 2 p(poor) + 1 p(bad), in (1, 5)

The published scorer takes softmax and sum in float16, whose steps there are up to 0.004; here they are in
float64. Published reward servers divide by 5; tables show the score itself (SD3.5-M: 4.07).

Source: arXiv 2501.11561, section 3; zhiyuanyou/DeQA-Score, `src/evaluate/scorer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGE_MARK: Final = "<|image|>"
PROMPT: Final = (
    "USER: How would you rate the quality of this image?\n<|image|>\nASSISTANT: The quality of the image is"
)
"""The same for every image: DeQA-Score does not see what the image was meant to show."""
IMAGE_TOKEN: Final = -200
"""What the network takes for the image among token ids."""
LEVELS: Final = ("excellent", "good", "fair", "poor", "bad")
LEVEL_SCORES: Final = (5.0, 4.0, 3.0, 2.0, 1.0)


@dataclass(frozen=True)
class Preprocessing:
    """How pixels are made. Defaults are the published ones."""

    size: int = 448
    """Side of the network's input, pixels."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def of(cls, config: dict[str, Any]) -> Preprocessing:
        """From a `preprocessor_config.json` of CLIP.

        Raises:
            ValueError: it asks for something that `pixels` does not do.
        """
        try:
            size, crop = _side(config["size"]), _side(config["crop_size"])
            mean, std = (tuple(map(float, config[name])) for name in ("image_mean", "image_std"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"preprocessor_config.json: not CLIP's: {error!r}") from error
        steps = [config.get(name, True) for name in ("do_resize", "do_center_crop", "do_normalize")]
        resample = config.get("resample", int(Image.Resampling.BICUBIC))
        if size != crop or len(mean) != 3 or len(std) != 3 or not all(steps) or resample != 3:
            raise ValueError(
                "preprocessor_config.json: expected a bicubic resize and a crop of the same size, then "
                f"normalisation of three channels; found {config}"
            )
        return cls(size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def pad_to_square(image: NDArray[np.uint8], mean: Sequence[float]) -> NDArray[np.uint8]:
    """The image in the middle of a square of the mean colour.

    Args:
        image: (H, W, 3) RGB.
        mean: of each channel, in 0..1; its colour is rounded down.

    Returns:
        (S, S, 3) with S = max(H, W).
    """
    height, width = image.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(value * 255) for value in mean]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def pixels(images: Sequence[NDArray[np.uint8]], how: Preprocessing) -> NDArray[np.float32]:
    """What the network sees.

    Args:
        images: RGB, each (H, W, 3).

    Returns:
        (N, 3, size, size) float32.
    """
    size = (how.size, how.size)
    squares = [
        np.asarray(
            Image.fromarray(pad_to_square(image, how.mean)).resize(size, Image.Resampling.BICUBIC), np.float32
        )
        for image in images
    ]
    scaled = np.stack(squares) / np.float32(255)
    normal = (scaled - np.asarray(how.mean, np.float32)) / np.asarray(how.std, np.float32)
    return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))


def prompt_ids(tokenize: Callable[[str], Sequence[int]], bos: int) -> list[int]:
    """Token ids of PROMPT with IMAGE_TOKEN for the image.

    Args:
        tokenize: ids of a text, with `bos` in front; both sides of the image are tokenised by themselves.
        bos: id of the token that begins a text, kept at the very beginning only.
    """
    before, after = (list(tokenize(part)) for part in PROMPT.split(IMAGE_MARK))
    if before[:1] != [bos] or after[:1] != [bos]:
        raise ValueError(f"the tokenizer does not begin texts with token {bos}: it is not Llama's")
    return [*before, IMAGE_TOKEN, *after[1:]]


def level_ids(tokenize: Callable[[str], Sequence[int]], bos: int) -> list[int]:
    """Token ids of the five levels, in the order of LEVELS.

    Raises:
        ValueError: a level is not one token of its own.
    """
    tokens = [list(tokenize(level)) for level in LEVELS]
    ids = [token[-1] for token in tokens]
    if any(len(token) != 2 or token[0] != bos for token in tokens) or len(set(ids)) != len(LEVELS):
        raise ValueError(f"{', '.join(LEVELS)} must be one token each after {bos}; they are {tokens}")
    return ids


def level_probabilities(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Softmax over the levels.

    Args:
        logits: (N, 5), in the order of LEVELS.

    Returns:
        (N, 5); a row of NaN where a logit is not finite.
    """
    wide = logits.astype(np.float64)
    wide[~np.isfinite(wide).all(axis=1)] = np.nan
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return probabilities


def quality(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """The expected level.

    >>> quality(np.array([[0.0, 0.5, 0.5, 0.0, 0.0]])).tolist()
    [3.5]

    Args:
        probabilities: (N, 5), in the order of LEVELS.

    Returns:
        (N,) in 1..5.
    """
    scores: NDArray[np.float64] = probabilities @ np.asarray(LEVEL_SCORES)
    return scores


def _side(value: Any) -> int:
    """448, of 448, {"shortest_edge": 448} or {"height": 448, "width": 448}."""
    if isinstance(value, dict):
        sides = {int(side) for side in value.values()}
        if len(sides) != 1:
            raise ValueError(f"{value} is no square")
        return sides.pop()
    return int(value)
