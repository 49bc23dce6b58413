"""Tiny CLIP networks with random weights, in the formats of the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

SIDE = 32
WIDTH = 8
"""Of projected features."""
_LETTERS = sorted(ByteLevel.alphabet())
_MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
VOCABULARY = [
    *_LETTERS,
    *(f"{letter}</w>" for letter in _LETTERS),
    *("".join(pair) for pair in _MERGES),
    "<|startoftext|>",
    "<|endoftext|>",
]
LONG = "dog " * 75
"""Exactly as long as fits between the start and the end token."""


def architecture(eos_token_id: int = len(VOCABULARY) - 1, activation: str = "quick_gelu") -> dict[str, Any]:
    """A configuration of CLIPModel; 2 as `eos_token_id` is what published ones have."""
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    both = {**size, "projection_dim": WIDTH, "hidden_act": activation}
    text = {"vocab_size": len(VOCABULARY), "bos_token_id": len(VOCABULARY) - 2, "eos_token_id": eos_token_id}
    return {
        "projection_dim": WIDTH,
        "text_config": {**both, **text},
        "vision_config": {**both, "image_size": SIDE, "patch_size": 8},
    }


def randomise(network: nn.Module, seed: int = 0) -> None:
    """Weights large enough that features of two inputs differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name != "logit_scale":
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)


def save_clip(folder: Path, eos_token_id: int = len(VOCABULARY) - 1) -> CLIPModel:
    """A checkpoint of transformers' CLIPModel, with config.json and model.safetensors."""
    network = CLIPModel(CLIPConfig(**architecture(eos_token_id))).eval()
    randomise(network)
    network.save_pretrained(folder)
    return network


def save_tokenizer(folder: Path, vocabulary: list[str] = VOCABULARY) -> CLIPTokenizer:
    """A byte-pair encoding of CLIP's kind: 256 bytes, the same at the end of a word, merges, two marks."""
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=_MERGES,
        model_max_length=77,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def photos(*sizes: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """Random images of (height, width)."""
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in sizes]


class OpenClip(nn.Module):
    """open_clip's CLIP with a vision transformer: its names, its layout, its order of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = _Tower(grid=(SIDE // 8) ** 2 + 1)
        self.visual.conv1 = nn.Conv2d(3, 16, 8, 8, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.zeros(16))
        self.visual.proj = nn.Parameter(torch.zeros(16, WIDTH))
        self.visual.ln_pre = nn.LayerNorm(16)
        self.visual.ln_post = nn.LayerNorm(16)
        self.token_embedding = nn.Embedding(len(VOCABULARY), 16)
        self.positional_embedding = nn.Parameter(torch.zeros(77, 16))
        self.transformer = _Transformer()
        self.ln_final = nn.LayerNorm(16)
        self.text_projection = nn.Parameter(torch.zeros(16, WIDTH))
        self.logit_scale = nn.Parameter(torch.tensor(4.6052))
        self.register_buffer("attn_mask", torch.full((77, 77), float("-inf")).triu(1))

    def encode_image(self, pixels: Tensor) -> Tensor:
        visual = self.visual
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, 16), x], dim=1) + visual.positional_embedding
        x = visual.transformer(visual.ln_pre(x), None)
        return torch.nn.functional.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(N, 77) tokens; the highest ends the prompt."""
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding, self.attn_mask)
        x = self.ln_final(x)[torch.arange(len(x)), tokens.argmax(dim=-1)]
        return torch.nn.functional.normalize(x @ self.text_projection, dim=-1)


class _Tower(nn.Module):
    def __init__(self, grid: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(grid, 16))
        self.transformer = _Transformer()


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([_Block(), _Block()])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.ln_2 = nn.LayerNorm(16)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(16, 24))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(24, 16))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))
