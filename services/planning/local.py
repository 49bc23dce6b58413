"""The architecture of a pipeline that lies in a local directory, as its configurations have it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from safetensors import safe_open

from policy.errors import PolicyError
from policy.registry import read_family
from services.config import ModelConfig
from services.config_file import ConfigError, find
from services.planning.published import MODELS, Published

CLIP_TOKENS = 77
COUNTED = (
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
    "UNet2DConditionModel",
)
"""Denoisers whose inputs services/planning/published.py can make."""


def architecture(config: ModelConfig) -> Published:
    """Of `model.path`: a published model by its hub id, or what a local directory says.

    Raises:
        ConfigError: neither; the text names the models that are known.
    """
    known = {model["hub"]: name for name, model in MODELS.items() if not name.endswith("-tiny")}
    if config.path in known:
        return Published.named(known[config.path])
    directory = find(config.path)
    if not directory.is_dir():
        raise ConfigError(
            f"model.path {config.path!r}: nothing is known of its architecture, and it is no directory here; "
            f"give a directory in diffusers format, or one of {', '.join(sorted(known))}"
        )
    try:
        family, configs = read_family(config)
    except PolicyError as error:
        raise ConfigError(str(error)) from error
    parts = family.parts
    if parts.denoiser_class not in COUNTED:
        raise ConfigError(
            f"model.path {config.path!r}: passes of a {parts.denoiser_class} are not counted; counted are "
            f"{', '.join(COUNTED)}"
        )
    clip = _tokenizer_length(directory)
    tokens = {"SD3Transformer2DModel": clip + config.max_sequence_length, "UNet2DConditionModel": clip}
    return Published(
        name=directory.name,
        hub=config.path,
        denoiser=parts.denoiser_class,
        config={key: value for key, value in configs.denoiser.items() if not key.startswith("_")},
        text_tokens=tokens.get(parts.denoiser_class, config.max_sequence_length),
        text_billions=sum(_parameters(directory / name) for name in parts.encoders) / 1e9,
        compression=family.geometry(configs).compression,
    )


def _tokenizer_length(directory: Path) -> int:
    file = directory / "tokenizer" / "tokenizer_config.json"
    if not file.is_file():
        return CLIP_TOKENS
    return int(json.loads(file.read_text(encoding="utf-8")).get("model_max_length", CLIP_TOKENS))


def _parameters(component: Path) -> int:
    """In the safetensors files of a folder; only their headers are read."""
    count = 0
    for file in component.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            count += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return count
