"""Weights in the layout of open_clip, in transformers' CLIPModel.

The networks are the same; only names differ, query, key and value are one matrix in open_clip, and the two
projections are stored transposed. open_clip's activation is the exact GELU (`gelu`), or OpenAI's `quick_gelu`
where its configuration says so: the weights do not tell, the caller must know.

Promises
- Every tensor of the file is used and every weight of the network is in the file, with its shape; else
  ValueError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor
from transformers import CLIPConfig, CLIPModel

_NAMES: Final = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED: Final = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_IN_BLOCK: Final = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_BLOCK: Final = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
_NO_WEIGHTS: Final = {"attn_mask"}
"""A constant that old versions of open_clip stored."""


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a CLIPModel.

    Args:
        weights: the state dict of open_clip's `CLIP` with a vision transformer.

    Raises:
        ValueError: a name is not one of that network.
    """
    state: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name in _NO_WEIGHTS:
            continue
        if name in _NAMES:
            state[_NAMES[name]] = value
        elif name in _TRANSPOSED:
            state[_TRANSPOSED[name]] = value.T.contiguous()
        else:
            state.update(_block(name, value))
    return state


def load_open_clip(weights: Mapping[str, Tensor], config: CLIPConfig, source: str) -> CLIPModel:
    """A CLIPModel of `config` with the weights of open_clip, float32 on the CPU.

    Args:
        weights: see `to_transformers`.
        config: its `hidden_act` must be that of the network.
        source: where the weights are from, for the error.

    Raises:
        ValueError: they are not the weights of that network.
    """
    try:
        state = to_transformers(weights)
        network, found = _from_state(config, {name: value.float() for name, value in state.items()})
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: not the weights of this CLIP network: {error}") from error
    for wrong in ("missing", "unexpected"):
        if names := sorted(found[f"{wrong}_keys"]):
            raise ValueError(
                f"{source}: not the weights of this CLIP network: {len(names)} {wrong}, such as {names[0]}"
            )
    return network


def _from_state(config: CLIPConfig, state: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    # Not load_state_dict: that would first draw a billion random numbers.
    network, found = CLIPModel.from_pretrained(
        None, config=config, state_dict=state, dtype="float32", output_loading_info=True
    )
    return network, found


def _block(name: str, value: Tensor) -> dict[str, Tensor]:
    match = _BLOCK.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no weight of open_clip's CLIP with a vision transformer")
    visual, number, inner, kind = match.groups()
    layer = f"{'vision_model' if visual else 'text_model'}.encoder.layers.{number}"
    if inner == "attn.in_proj":
        parts = zip("qkv", value.chunk(3), strict=True)
        return {f"{layer}.self_attn.{part}_proj.{kind}": rows.contiguous() for part, rows in parts}
    if inner not in _IN_BLOCK:
        raise ValueError(f"{name!r} is no weight of open_clip's CLIP with a vision transformer")
    return {f"{layer}.{_IN_BLOCK[inner]}.{kind}": value}
