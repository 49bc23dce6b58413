"""A LoRA as `dgpo export` writes it (policy/export.py): what it says of itself, and its tensors to install.

Promises
- The base model, its revision, rank, alpha and targets are read from the file that holds the weights.
- Nothing is unpickled, and weights that are no numbers are refused: their images would be scored, and low.
  So are those for another base, unless it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from services.config_file import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

LORA: Final = "lora"
"""Where kinds of weights are told apart (`ema`, `policy`): those of an exported LoRA."""
_FILE: Final = "pytorch_lora_weights.safetensors"
BASE_DIGEST: Final = "base_digest"
"""Key of the file's metadata: of the base's weights (policy/base_digest.py)."""
_ABOUT: Final = "lora_adapter_metadata"
_NEEDED: Final = ("base_model_name_or_path", "r", "lora_alpha", "target_modules")


@dataclass(frozen=True)
class LoraBase:
    """What the adapters were trained on, and how they lie in it."""

    path: str
    revision: str | None
    settings: Mapping[str, Any]
    """The section `model.lora`."""
    digest: str | None
    """Of its weights (policy/base_digest.py); None: the LoRA is of an older version, which did not say."""


def is_exported_lora(directory: Path) -> bool:
    return lora_file(directory).is_file()


def lora_file(directory: Path) -> Path:
    """Its weights."""
    return directory / _FILE


def base_of(directory: Path) -> LoraBase:
    """What a LoRA says of itself.

    Raises:
        ConfigError: it does not say it, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    file = lora_file(directory)
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        told = json.loads(metadata.get(_ABOUT, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    # Each key behind the part that is adapted: `transformer.r`. Of other tools it may be anything.
    about = {name.partition(".")[2]: value for name, value in told.items()} if isinstance(told, dict) else {}
    if missing := [name for name in _NEEDED if about.get(name) is None]:
        raise ConfigError(
            f"{file}: does not say its {', '.join(missing)}: no LoRA of `dgpo export`, or one of an older "
            "version; export it again, or export the pipeline"
        )
    return LoraBase(
        path=str(about["base_model_name_or_path"]),
        revision=about.get("revision"),
        settings={"rank": about["r"], "alpha": about["lora_alpha"], "targets": about["target_modules"]},
        digest=metadata.get(BASE_DIGEST),
    )


def check_base(lora: Path, digest: str | None, found: str | None, place: str) -> None:
    """Whether a LoRA is for the base that it is to be put on.

    Args:
        digest: of the weights that it was trained on.
        found: of those of the base at `place`. Of either, None: not known.

    Raises:
        ConfigError: it is not.
    """
    if digest is None or found is None or digest == found:
        return
    base = base_of(lora)
    at = f"{base.path} (revision {base.revision})" if base.revision is not None else base.path
    raise ConfigError(
        f"{lora} was not trained on the model at {place}, whose weights have the digest {found}, but on one "
        f"with {digest}, then at {at}: on another base its images are not those that were trained. Say where "
        "its own is (--set model.path=DIR), or go on with this one all the same (--other-base)"
    )


def read_lora(directory: Path) -> dict[str, Tensor]:
    """Its tensors, by the names of a policy's trained parameters.

    Raises:
        ConfigError: one of them is NaN or infinite.
    """
    import torch
    from safetensors.torch import load_file

    from policy.adapters import ADAPTER_NAME

    file = lora_file(directory)
    tensors = load_file(file)
    if wrong := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise ConfigError(
            f"{file}: {len(wrong)} of {len(tensors)} weights are not finite (NaN or infinite), the first "
            f"of them {wrong[0]}; export it again"
        )
    return {
        name.partition(".")[2].replace(".weight", f".{ADAPTER_NAME}.weight"): tensor
        for name, tensor in tensors.items()
    }
