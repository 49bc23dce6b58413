"""HPS v2 and v2.1: human preference of an image for a prompt, by a fine-tuned CLIP-H.

    score = cosine(image, prompt)                             (a few tenths)

The published weights are in open_clip's layout; they are converted when loaded. Preprocessing: longer side to
224 with Pillow's bicubic filter, black around. Prompts: HTML entities resolved twice, cut at 77 tokens.

Differences to the published code: it runs under autocast to float16, this in `dtype`; it repairs broken
Unicode in prompts with ftfy, this does not; it fails on an oblong image whose longer side is 224 already,
which here is padded as every other.

Source: Wu et al., arXiv 2306.09341, `hpsv2/img_score.py`; weights `xswu/HPSv2`,
`HPS_v2_compressed.pt` and `HPS_v2.1_compressed.pt`.
"""

from __future__ import annotations

import html
from typing import Any, Final

from torch import Tensor
from transformers import CLIPConfig

from reward_servers.networks.clip import Clip, ClipOptions, ClipPairScorer, ClipTokens
from reward_servers.networks.loading import neural_options, read_weights, weight_file
from reward_servers.networks.open_clip import load_open_clip
from reward_servers.networks.pixels import clip_pixels
from reward_servers.wire import Images

VIT_H_14: Final[dict[str, Any]] = {
    "projection_dim": 1024,
    "text_config": {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "projection_dim": 1024,
        "hidden_act": "gelu",
        "eos_token_id": 49407,
    },
    "vision_config": {
        "image_size": 224,
        "patch_size": 14,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
}
"""open_clip's `ViT-H-14` as a configuration of transformers' CLIPModel."""


class HpsOptions(ClipOptions):
    """Arguments of the `hpsv2` scorer."""

    path: str = "xswu/HPSv2"
    """Local directory or hub id that holds `file`, or the file itself."""
    file: str = "HPS_v2.1_compressed.pt"
    """Weights in open_clip's layout; `HPS_v2_compressed.pt` is version 2.0."""
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Local directory or hub id of the tokenizer: any copy of CLIP's, 49408 tokens."""


def create(args: dict[str, Any], threads: int) -> HpsScorer:
    return HpsScorer(neural_options(HpsOptions, args, threads), VIT_H_14)


class HpsScorer(ClipPairScorer):
    name = "hpsv2"
    version = "1"

    def __init__(self, options: HpsOptions, architecture: dict[str, Any]) -> None:
        file = weight_file(options.path, options.file, options.revision)
        network = load_open_clip(read_weights(file), CLIPConfig(**architecture), str(file))
        clip = Clip(network, options)
        tokens = ClipTokens(options.tokenizer, clip.text_config)
        super().__init__(clip, tokens, options, factor=1 / options.scale)
        self.model = f"{file.name} ({self.model})"

    def pixels(self, images: Images, side: int) -> Tensor:
        return clip_pixels(images, side, pad=True)

    def caption(self, prompt: str) -> str:
        return html.unescape(html.unescape(prompt)).strip()
