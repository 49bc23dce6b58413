"""The colour of a found object by CLIP ViT-L/14, zero-shot, as GenEval's evaluation tells it.

    crop      the object's box, everything outside its mask painted #999
    logits    cosine of the crop's feature with the mean of a colour's three normalised text features
    colour    the argmax over ten colours

Promises
- The network has QuickGELU, with which the OpenAI checkpoint was trained; one that has not is refused. (The
  plain `ViT-L-14` of open_clip has not, and the published DGPO scorer puts OpenAI's weights into it: other
  features, and no error.)

Source: GenEval (arXiv 2310.11513), `evaluation/evaluate_images.py`; zero-shot classifier of CLIP (arXiv
2103.00020). Crops: shorter side to the network's input, Pillow's bicubic filter, centre cut out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from reward_servers.geneval.detector import Found, crop
from reward_servers.geneval.task import COLOURS
from reward_servers.networks.clip import Clip, ClipTokens
from reward_servers.networks.loading import NeuralOptions
from reward_servers.networks.pixels import clip_pixels

TEMPLATES: Final = ("a photo of a {c} {name}", "a photo of a {c}-colored {name}", "a photo of a {c} object")
BACKGROUND: Final = (0x99, 0x99, 0x99)


class ColourClassifier:
    """A CLIP model in the format of transformers.

    Args:
        source: local directory or hub id, with its tokenizer.
    """

    def __init__(self, source: str, options: NeuralOptions) -> None:
        self._clip = Clip.load(source, options)
        if (acts := self._clip.activations) != {"quick_gelu"}:
            raise ValueError(
                f"{source}: its hidden_act is {', '.join(sorted(acts))}; colours are told by OpenAI's "
                "checkpoint, whose activation is quick_gelu, such as openai/clip-vit-large-patch14"
            )
        self._tokens = ClipTokens(source, self._clip.text_config, options.revision)
        self._directions: dict[str, Tensor] = {}

    def classify(self, objects: Sequence[tuple[NDArray[np.uint8], Found]]) -> list[str | None]:
        """The colour of each object, one of COLOURS; None where the network's output is not finite.

        Args:
            objects: (H, W, 3) RGB images, and what was found in them.
        """
        if not objects:
            return []
        crops = [crop(image, found, BACKGROUND) for image, found in objects]
        told: list[str | None] = []
        for feature, (_, found) in zip(self._clip.image_features(crops, clip_pixels), objects, strict=True):
            cosines = self.directions(found.detection.name) @ feature
            told.append(COLOURS[int(cosines.argmax())] if bool(torch.isfinite(cosines).all()) else None)
        return told

    def directions(self, name: str) -> Tensor:
        """(colours, features) float32 unit vectors: objects of class `name` in each colour."""
        if name not in self._directions:
            texts = [template.format(c=colour, name=name) for colour in COLOURS for template in TEMPLATES]
            tokens, _ = self._tokens.encode(texts)
            each = self._clip.text_features(tokens).view(len(COLOURS), len(TEMPLATES), -1)
            self._directions[name] = normalize(each.mean(1), dim=-1)
        return self._directions[name]
