"""The network of ImageReward v1 on the BLIP of transformers, from the files that its authors published.

`ImageReward.pt` holds BLIP's own names (`blip.visual_encoder.*`, `blip.text_encoder.*`, `mlp.layers.*`);
they are renamed on loading. Sizes of the text encoder are in `med_config.json`; those of the image encoder
follow from the shapes of its weights (BLIP's heads are 64 wide).

Promises
- Every weight of the network comes from the checkpoint, in its shape, or loading fails and names the first
  that does not.
- Nothing is unpickled but tensors.

Source: ImageReward (arXiv 2304.05977), `ImageReward/ImageReward.py`; BLIP (arXiv 2201.12086), `med.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from reward_servers.networks.loading import NeuralOptions, frozen, read_weights

HEAD_WIDTH: Final = 64
"""Of both image encoders that BLIP has (ViT-B and ViT-L)."""
MEAN: Final = 0.16717362830052426
STD: Final = 1.0333394966054072
"""Of the head's output, as its authors measured it: scores are in units of this."""

_VISION: Final = "blip.visual_encoder."
_TEXT: Final = "blip.text_encoder."
_HEAD: Final = "mlp.layers."
_VISION_NAMES: Final = (
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding$", "pos_embed"),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.self_attn\.qkv\.", ".attn.qkv."),
    (r"\.self_attn\.projection\.", ".attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"^post_layernorm\.", "norm."),
)
"""Names of transformers -> BLIP's."""


class ImageRewardNetwork:
    """Images and tokenised prompts, pair by pair, to scores."""

    def __init__(
        self, vision: nn.Module, text: nn.Module, head: nn.Module, *, image_size: int, vocabulary: int
    ) -> None:
        self.image_size = image_size
        self.vocabulary = vocabulary
        self._vision = vision
        self._text = text
        self._head = head

    @torch.inference_mode()
    def score(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The rewards of pairs.

        Args:
            pixels: (N, 3, image_size, image_size) float32, normalised.
            tokens: (N, 35) int64.
            mask: (N, 35) int64, 0 where padded.

        Returns:
            (N,) float32 on the CPU: (head - MEAN) / STD, about -2 to 2.
        """
        place = next(self._vision.parameters())
        embedded = self._vision(pixel_values=pixels.to(place)).last_hidden_state
        read = self._text(
            input_ids=tokens.to(place.device),
            attention_mask=mask.to(place.device),
            encoder_hidden_states=embedded,
        ).last_hidden_state
        # The head is in float32 whatever the encoders are in, as published.
        rewards: Tensor = self._head(read[:, 0].float()).squeeze(1)
        return ((rewards - MEAN) / STD).cpu()


def load_image_reward(weights: Path, config: Path, options: NeuralOptions) -> ImageRewardNetwork:
    """The network of a checkpoint.

    Args:
        weights: `ImageReward.pt`, or the same tensors as `.safetensors`.
        config: its `med_config.json`.

    Raises:
        ValueError: one of the files is not what it should be, or they do not belong together.
    """
    found = read_weights(weights)
    vision_config = _vision_config(found, weights)
    text_config = _text_config(config, vision_config.hidden_size)
    vision = _bind(BlipVisionModel(vision_config), found, _vision_name, weights)
    text = _bind(
        BlipTextModel(text_config, add_pooling_layer=False), found, lambda name: _TEXT + name, weights
    )
    head = _bind(_head(text_config.hidden_size), found, lambda name: _HEAD + name, weights)
    layers = text_config.num_hidden_layers
    if more := next((key for key in found if key.startswith(f"{_TEXT}encoder.layer.{layers}.")), None):
        raise ValueError(f"{weights}: {more} is one layer too many for {config}, which says {layers}")
    exact = options.model_copy(update={"dtype": "float32"})
    return ImageRewardNetwork(
        frozen(vision, options),
        frozen(text, options),
        frozen(head, exact),
        image_size=vision_config.image_size,
        vocabulary=text_config.vocab_size,
    )


def _head(width: int) -> nn.Sequential:
    """The published head; its dropouts do nothing here, but keep the numbers in the names of the weights."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


def _vision_config(found: Mapping[str, Tensor], path: Path) -> Any:
    patches = _shape(found, f"{_VISION}patch_embed.proj.weight", 4, path)
    positions = _shape(found, f"{_VISION}pos_embed", 3, path)
    inner = _shape(found, f"{_VISION}blocks.0.mlp.fc1.weight", 2, path)
    block = re.compile(re.escape(_VISION) + r"blocks\.(\d+)\.")
    depth = max(int(match[1]) for key in found if (match := block.match(key))) + 1
    width, patch = patches[0], patches[-1]
    if width % HEAD_WIDTH:
        raise ValueError(f"{path}: an image encoder of width {width}; BLIP's is a multiple of {HEAD_WIDTH}")
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner[0],
        num_hidden_layers=depth,
        num_attention_heads=width // HEAD_WIDTH,
        image_size=math.isqrt(positions[1] - 1) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )


def _text_config(path: Path, encoder_width: int) -> Any:
    try:
        said = json.loads(path.read_text())
        return BlipTextConfig(
            vocab_size=said["vocab_size"],
            hidden_size=said["hidden_size"],
            encoder_hidden_size=encoder_width,
            intermediate_size=said["intermediate_size"],
            num_hidden_layers=said["num_hidden_layers"],
            num_attention_heads=said["num_attention_heads"],
            max_position_embeddings=said["max_position_embeddings"],
            hidden_act=said["hidden_act"],
            layer_norm_eps=said["layer_norm_eps"],
            pad_token_id=said["pad_token_id"],
        )
    except KeyError as error:
        raise ValueError(f"{path}: no {error.args[0]!r} in it") from error
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: no configuration of BLIP's text encoder: {error}") from error


def _shape(found: Mapping[str, Tensor], name: str, dimensions: int, path: Path) -> tuple[int, ...]:
    if name not in found:
        raise ValueError(f"{path}: no weight {name}: this is no checkpoint of ImageReward v1")
    shape = tuple(found[name].shape)
    if len(shape) != dimensions:
        raise ValueError(f"{path}: {name} has the shape {list(shape)}, not {dimensions} dimensions")
    return shape


def _vision_name(name: str) -> str:
    for pattern, replacement in _VISION_NAMES:
        name = re.sub(pattern, replacement, name)
    return _VISION + name


def _bind(
    network: Any, found: Mapping[str, Tensor], published: Callable[[str], str], path: Path
) -> nn.Module:
    """`network` with the tensors of the checkpoint; `published` gives their names in it."""
    state: dict[str, Tensor] = {}
    for name, expected in network.state_dict().items():
        tensor = found.get(published(name))
        if tensor is None:
            raise ValueError(f"{path}: no weight {published(name)}: this is no checkpoint of ImageReward v1")
        if tensor.shape != expected.shape:
            raise ValueError(
                f"{path}: {published(name)} has the shape {list(tensor.shape)}, "
                f"where its configuration needs {list(expected.shape)}"
            )
        state[name] = tensor
    network.load_state_dict(state, strict=True)
    bound: nn.Module = network
    return bound
