"""ImageReward v1: human preference for an image given its prompt, by a BLIP with a regression head.

    reward = (mlp(BLIP(image, prompt)[CLS]) - 0.16717) / 1.03334

About -2 to 2; SD3.5-M has 0.87 on DrawBench, and 1.0 to 1.3 after DGPO. `THUDM/ImageReward` is 446 M weights,
1.8 GB in float32, Apache-2. Each image is scored with its own prompt only and encoded once.

Preprocessing: the shorter side to 224 pixels, bicubic, centre crop, CLIP's mean and deviation; prompts
through the tokenizer of `bert-base-uncased`, padded and cut to 35 tokens. The rest of a longer prompt is not
seen: `truncated` of the details is 1.

Source: arXiv 2304.05977, `ImageReward/ImageReward.py` of its authors (image 224, tokens 35, first token).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from transformers import AutoTokenizer

from reward_servers.networks.image_reward import load_image_reward
from reward_servers.networks.loading import (
    NeuralOptions,
    NeuralScorer,
    neural_options,
    require_place,
    weight_file,
    weights_name,
)
from reward_servers.networks.pixels import clip_pixels
from reward_servers.scorer import ItemScore
from reward_servers.wire import ScoreCall

CONFIG: Final = "med_config.json"
TOKENS: Final = 35
"""Length that prompts are padded and cut to."""


class ImageRewardOptions(NeuralOptions):
    """Arguments of the `imagereward` scorer."""

    path: str = "THUDM/ImageReward"
    """Local directory or hub id with `weights` and `med_config.json`; or the local file beside the latter."""
    weights: str = "ImageReward.pt"
    """File of the weights; one that ends in `.safetensors` is read as such."""
    tokenizer: str = "google-bert/bert-base-uncased"
    """Local directory or hub id of the tokenizer."""


def create(args: dict[str, Any], threads: int) -> ImageRewardScorer:
    return ImageRewardScorer(neural_options(ImageRewardOptions, args, threads))


class ImageRewardScorer(NeuralScorer):
    name = "imagereward"
    version = "1"

    def __init__(self, options: ImageRewardOptions) -> None:
        super().__init__(options, weights_name(options.path, options.revision))
        weights = weight_file(options.path, options.weights, options.revision)
        config = (
            weights.with_name(CONFIG)
            if weights == Path(options.path)
            else weight_file(options.path, CONFIG, options.revision)
        )
        self._network = load_image_reward(weights, config, options)
        try:
            require_place(options.tokenizer)
            self._tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        except Exception as error:
            raise ValueError(f"{options.tokenizer}: no tokenizer could be loaded: {error}") from error
        if len(self._tokenizer) > self._network.vocabulary:
            raise ValueError(
                f"{options.tokenizer}: {len(self._tokenizer)} tokens, where the network knows "
                f"{self._network.vocabulary}: this is not the tokenizer it was trained with"
            )

    def score(self, call: ScoreCall) -> Sequence[ItemScore]:
        prompts = list(call.prompts)
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        pixels = clip_pixels(call.images, self._network.image_size)
        rewards = self._network.score(pixels, tokens.input_ids, tokens.attention_mask)
        return [
            self.item(reward, {"truncated": int(len(self._tokenizer(prompt).input_ids) > TOKENS)})
            for reward, prompt in zip(rewards.tolist(), prompts, strict=True)
        ]

    def warm_up(self) -> None:
        self.score(ScoreCall([np.zeros((64, 64, 3), np.uint8)], ["warm-up"], [{}]))
