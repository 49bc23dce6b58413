"""PickScore v1: which of two images people prefer for a prompt, by a fine-tuned CLIP-H.

    score = exp(logit_scale) * cosine(image, prompt)          (about 100 * cosine; SD3.5-M: 21.7)

Published tables show this raw score; the training code of Flow-GRPO and DGPO divides it by 26: `scale: 26`.
Prompts are cut at 77 tokens. Preprocessing is that of transformers' CLIPImageProcessor: shorter side to 224
with Pillow's bicubic filter, centre crop.

Source: Kirstain et al., arXiv 2305.01569; model card of `yuvalkirstain/PickScore_v1`, whose processor is
that of `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reward_servers.networks.clip import Clip, ClipOptions, ClipPairScorer, ClipTokens
from reward_servers.networks.loading import neural_options
from reward_servers.networks.pixels import clip_pixels
from reward_servers.wire import Images


class PickScoreOptions(ClipOptions):
    """Arguments of the `pickscore` scorer."""

    path: str = "yuvalkirstain/PickScore_v1"
    """Local directory or hub id of the network, in the format of transformers' CLIPModel."""
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Local directory or hub id of the tokenizer."""


def create(args: dict[str, Any], threads: int) -> PickScoreScorer:
    return PickScoreScorer(neural_options(PickScoreOptions, args, threads))


class PickScoreScorer(ClipPairScorer):
    name = "pickscore"
    version = "1"

    def __init__(self, options: PickScoreOptions) -> None:
        clip = Clip.load(options.path, options)
        tokens = ClipTokens(options.tokenizer, clip.text_config)
        super().__init__(clip, tokens, options, factor=clip.temperature / options.scale)

    def pixels(self, images: Images, side: int) -> Tensor:
        return clip_pixels(images, side, crop="floor")
