"""Pixels that CLIP networks get, against the preprocessing of transformers, torchvision and HPSv2."""

from typing import Any

import pytest
import torch
from PIL import Image

from reward_servers.networks.pixels import clip_pixels
from reward_servers.scorers.clipscore import bilinear_pixels
from tests.unit.reward_servers.networks.published_pixels import (
    hps_square,
    normalised,
    processed,
    torchvision_resized,
)
from tests.unit.reward_servers.networks.tiny_clip import SIDE, photos

SIZES = ((32, 32), (40, 71), (90, 33), (17, 25), (64, 64))


@pytest.mark.parametrize("size", [*SIZES, (33, 32), (35, 32), (32, 37), (224, 129), (7, 5), (4, 64)])
def test_pixels_are_those_of_transformers(size: tuple[int, int]) -> None:
    """Odd remainders too, where torchvision rounds and transformers cuts."""
    images = photos(size)
    found = clip_pixels(images, SIDE, crop="floor")
    assert found.shape == (1, 3, SIDE, SIDE) and found.dtype == torch.float32
    torch.testing.assert_close(found, processed(images, SIDE), atol=2e-6, rtol=0)


def test_torchvision_rounds_the_centre() -> None:
    """An odd remainder of 3: (35 - 32) / 2 = 1.5, rounded to 2, cut to 1."""
    images = photos((SIDE, SIDE + 3))
    rounded, floored = (clip_pixels(images, SIDE, crop=crop) for crop in ("round", "floor"))
    assert torch.equal(
        rounded, normalised(torch.from_numpy(images[0][:, 2:34].copy()).permute(2, 0, 1) / 255)[None]
    )
    assert torch.equal(rounded[..., :-1], floored[..., 1:])


@pytest.mark.parametrize("size", [*SIZES, (32, 35), (224, 129), (7, 5), (4, 64), (1, 1)])
def test_padded_pixels_are_those_of_hpsv2(size: tuple[int, int]) -> None:
    images = photos(size)
    torch.testing.assert_close(
        clip_pixels(images, SIDE, pad=True)[0], hps_square(images[0], SIDE), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("size", [*SIZES, (32, 35), (224, 129), (7, 5), (4, 64), (1, 1)])
def test_bilinear_pixels_are_those_of_torchvision(size: tuple[int, int]) -> None:
    """Up to torch's own rounding, which takes the weights in float32."""
    images = photos(size)
    torch.testing.assert_close(
        bilinear_pixels(images, SIDE), torchvision_resized(images, SIDE), atol=3e-5, rtol=0
    )


@pytest.mark.parametrize("shape", [(1, 4096), (4096, 2)])
def test_a_line_of_pixels_takes_little_memory(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resized whole, 1 x 4096 pixels would be 224 x 917,504."""
    largest = 0
    resize = Image.Image.resize

    def watched(image: Image.Image, size: tuple[int, int], *args: Any, **kwargs: Any) -> Image.Image:
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    images = photos(shape)
    for pixels in (
        clip_pixels(images, 224),
        clip_pixels(images, 224, pad=True),
        bilinear_pixels(images, 224),
    ):
        assert pixels.shape == (1, 3, 224, 224) and torch.isfinite(pixels).all()
    assert largest <= 16 * 224 * 224
