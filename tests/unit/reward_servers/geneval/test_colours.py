"""The colour classifier against the published formula, computed with CLIP's own network and Pillow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from reward_servers.geneval.colours import ColourClassifier
from reward_servers.geneval.detector import Found
from reward_servers.geneval.rules import Detection
from reward_servers.networks.loading import NeuralOptions
from tests.unit.reward_servers.networks.tiny_clip import SIDE, architecture, photos, randomise, save_tokenizer

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def classifier(clip_folder: Path) -> ColourClassifier:
    return ColourClassifier(str(clip_folder), NeuralOptions(max_batch=7))


def objects(count: int) -> list[tuple[NDArray[np.uint8], Found]]:
    """Objects of one class or another, in images of one colour or another with noise."""
    rng = np.random.default_rng(5)
    made = []
    for index in range(count):
        image = (photos((48, 60))[0] // 2 + rng.integers(0, 128, 3)).astype(np.uint8)
        x, y = rng.integers(0, 20, 2)
        box = (float(x), float(y), float(x + rng.integers(8, 40)), float(y + rng.integers(8, 28)))
        detection = Detection(("cup", "tv remote", "cow")[index % 3], 0.9, box)
        made.append((image, Found(detection, rng.random((48, 60)) < 0.6)))
    return made


@dataclass(frozen=True)
class Published:
    clip: CLIPModel
    tokenizer: CLIPTokenizer

    def colour(self, image: NDArray[np.uint8], found: Found, *, masked: bool = True) -> str:
        return COLOURS[int(self.logits(image, found, masked).argmax())]

    def logits(self, image: NDArray[np.uint8], found: Found, masked: bool) -> Tensor:
        """100 x cosine with each colour."""
        picture = Image.fromarray(image)
        if masked:
            blank = Image.new("RGB", picture.size, color="#999")
            picture = Image.composite(picture, blank, Image.fromarray(found.mask))
        picture = picture.crop([int(side) for side in found.detection.box])
        width, height = picture.size
        scale = SIDE / min(width, height)
        picture = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
        left, top = round((picture.width - SIDE) / 2), round((picture.height - SIDE) / 2)
        picture = picture.crop((left, top, left + SIDE, top + SIDE))
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        pixels = (torch.tensor(np.array(picture)).permute(2, 0, 1) / 255 - mean) / deviation
        with torch.no_grad():
            feature = self.clip.get_image_features(pixel_values=pixels[None]).pooler_output[0]
            rows = torch.stack([self.row(colour, found.detection.name) for colour in COLOURS])
        return 100 * rows @ (feature / feature.norm())

    def row(self, c: str, name: str) -> Tensor:
        texts = [f"a photo of a {c} {name}", f"a photo of a {c}-colored {name}", f"a photo of a {c} object"]
        tokens = self.tokenizer(texts, padding="max_length", return_tensors="pt")
        with torch.no_grad():
            each = self.clip.get_text_features(**tokens).pooler_output
        mean = (each / each.norm(dim=-1, keepdim=True)).mean(0)
        return mean / mean.norm()


@pytest.fixture(scope="module")
def published(clip_folder: Path) -> Published:
    return Published(CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder))


def test_colours_are_the_published_ones(classifier: ColourClassifier, published: Published) -> None:
    asked = objects(20)
    expected = [published.colour(*one) for one in asked]
    assert classifier.classify(asked) == expected
    assert len(set(expected)) > 2
    assert [published.colour(*one, masked=False) for one in asked] != expected, "the mask must matter here"


def test_directions_are_normalised_means_of_three_templates(
    classifier: ColourClassifier, published: Published
) -> None:
    expected = torch.stack([published.row(colour, "tv remote") for colour in COLOURS])
    torch.testing.assert_close(classifier.directions("tv remote"), expected)


def test_nothing_asked_is_nothing_told(classifier: ColourClassifier) -> None:
    assert classifier.classify([]) == []


def test_output_that_is_not_finite_is_no_colour(clip_folder: Path) -> None:
    classifier = ColourClassifier(str(clip_folder), NeuralOptions())
    with torch.no_grad():
        classifier._clip._network.visual_projection.weight[0, 0] = float("inf")
    assert classifier.classify(objects(2)) == [None, None]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_temperature_is_not_rounded_to_the_networks_dtype(clip_folder: Path, dtype: str) -> None:
    exact = ColourClassifier(str(clip_folder), NeuralOptions())._clip
    rough = ColourClassifier(str(clip_folder), NeuralOptions(dtype=dtype))._clip  # type: ignore[arg-type]
    assert rough.temperature == exact.temperature
    assert {parameter.dtype for parameter in rough._network.parameters()} == {getattr(torch, dtype)}


def test_a_network_without_quick_gelu_is_refused(tmp_path: Path) -> None:
    network = CLIPModel(CLIPConfig(**architecture(activation="gelu")))
    randomise(network)
    network.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="hidden_act is gelu; colours are told by OpenAI's checkpoint"):
        ColourClassifier(str(tmp_path), NeuralOptions())
