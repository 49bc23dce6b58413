"""Is all of a component in its files, and nothing else? The libraries do not ask.

Promises
- A weight that is in no file, one that the configuration has no place for, one of another shape and one that
  is not a number are a PolicyError that names component, file and weights: no weight of a model is ever a
  random one.
- What headers tell of that is told without reading a weight (`check_whole`), by the rule by which a component
  is refused when it is loaded (`load_whole`). What they leave open is left to the loading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from policy.component_files import (
    DENOISER_FILE,
    ENCODER_FILE,
    MEND,
    REMEDY,
    ComponentFiles,
    check_weights,
    counted,
)
from policy.errors import PolicyError

FLOATS: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")
_OTHER_NAMES: Final = re.compile(r'"(quantization_config|transformers_weights)"\s*:(?!\s*null)')
"""In a config.json: its files hold other weights than those of the component, or are called otherwise."""


def check_whole(told: str, kind: Any, folder: Path) -> tuple[ComponentFiles, str]:
    """What `load_whole` would refuse, as far as headers tell; no weight is read, and none is allocated.

    Args:
        told: the component, for the error.
        kind: its class, of diffusers or transformers.

    Returns:
        Its files, and why their headers were not held against its configuration; empty: they were.

    Raises:
        PolicyError: its files are not whole, or not of what its configuration describes.
    """
    files = check_weights(told, folder, _file_name(kind))
    config = folder / "config.json"
    try:
        other = _OTHER_NAMES.search(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolicyError(f"{told} cannot be loaded: {config}: {error}; {MEND}") from error
    if other:
        return files, f"its config.json has a {other[1]}"
    try:
        model, found = (_empty_of_diffusers if _of_diffusers(kind) else _empty_encoder)(kind, files)
    except MemoryError:
        raise
    # What cannot be made without memory may well be made with it.
    except Exception as error:
        return files, f"it cannot be made without its weights: {error!r}"
    _refuse_others(told, kind, model, found, files)
    return files, ""


def load_whole(told: str, kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A component of stock code, on the CPU, every weight of it from its files.

    Args:
        told: the component, for the error.
        kind: its class, of diffusers or transformers.

    Raises:
        PolicyError: its files are not whole, or not of what its configuration describes.
    """
    files = check_weights(told, folder, _file_name(kind))
    # Of other shapes transformers says only in its log which they are, unless it is to replace them.
    how: dict[str, Any] = (
        {"torch_dtype": dtype} if _of_diffusers(kind) else {"dtype": dtype, "ignore_mismatched_sizes": True}
    )
    # Nothing is unpickled: weights in another format are refused.
    how |= {"use_safetensors": True, "output_loading_info": True}
    model, found = read_component(told, kind, folder, **how)
    _refuse_others(told, kind, model, found, files)
    loaded: nn.Module = model
    return loaded


def read_component(told: str, kind: Any, folder: Path, **how: Any) -> Any:
    """What a library makes of the folder of a component.

    Raises:
        PolicyError: nothing can be made of it.
    """
    try:
        return kind.from_pretrained(str(folder), **how)
    except MemoryError:
        raise
    # Whatever a damaged file makes of its reader: KeyError, SafetensorError, a bare Exception of tokenizers.
    except Exception as error:
        # Of other shapes diffusers also says how to replace them by random weights.
        # The text of a KeyError is a key alone.
        text = repr(error) if isinstance(error, KeyError) or not str(error) else str(error)
        why = text.partition(" If you want to instead overwrite")[0]
        raise PolicyError(f"{told} cannot be loaded: {folder}: {why}") from error


def check_finite(told: str, module: nn.Module) -> None:
    """Whether every weight is a number: one look at memory that is loaded, on the device where it is.

    Raises:
        PolicyError: one is not.
    """
    tensors = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if tensor.dtype in FLOATS and tensor.numel() and not tensor.is_meta
    }
    # Both ends of a range with a NaN in it are NaN. All are fetched at once: a GPU is waited for once.
    ends = [torch.stack(torch.aminmax(tensor)).float() for tensor in tensors.values()]
    if not ends:
        return
    finite = torch.isfinite(torch.stack(ends)).all(dim=1).tolist()
    wrong = [
        name.replace(".base_layer.", ".") for name, good in zip(tensors, finite, strict=True) if not good
    ]
    if wrong:
        raise PolicyError(
            f"{told} has weights that are not finite (NaN or infinite): {counted(wrong)}; {REMEDY}, or set "
            "model.dtype to one that holds them"
        )


def _of_diffusers(kind: Any) -> bool:
    return bool(kind.__module__.startswith("diffusers."))


def _file_name(kind: Any) -> str:
    return DENOISER_FILE if _of_diffusers(kind) else ENCODER_FILE


def _refuse_others(
    told: str, kind: Any, model: nn.Module, found: Mapping[str, Any], files: ComponentFiles
) -> None:
    """Whether the weights that a library found are those of the component.

    Args:
        found: its `output_loading_info`.

    Raises:
        PolicyError: they are not.
    """
    missing, surplus = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        raise PolicyError(
            f"{told} is not whole: {files.place()} lacks {counted(missing)}, of the "
            f"{len(model.state_dict())} that its config.json describes; {REMEDY}; {MEND}"
        )
    for weight, there, wanted in sorted(found["mismatched_keys"]):
        raise PolicyError(
            f"{told} is not what its config.json describes: in {files.place([weight])} {weight} is "
            f"{tuple(there)}, expected {tuple(wanted)}; {MEND}"
        )
    if not _of_diffusers(kind):
        # Heads that a text encoder does not use may lie beside it; a layer more may not.
        known = {_NUMBER.sub("*", weight) for weight in model.state_dict()}
        surplus = [weight for weight in surplus if _NUMBER.sub("*", weight) in known]
    if surplus:
        raise PolicyError(
            f"{told} is not what its config.json describes: {files.place(surplus)} also holds "
            f"{counted(surplus)}, for which it has no place (too few layers?); {MEND}"
        )


def _empty_of_diffusers(kind: Any, files: ComponentFiles) -> tuple[nn.Module, dict[str, Any]]:
    """A component without weights, and what diffusers would find: it does so only as it reads them."""
    with torch.device("meta"):
        model = kind.from_config(kind.load_config(str(files.folder)))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there, listed = files.shapes, files.listed
    if listed is None:
        # Attention of old autoencoders; of shards it does not.
        model._fix_state_dict_keys_on_load(there)
        listed = frozenset(there)
    ignored = kind._keys_to_ignore_on_load_unexpected or ()
    return model, {
        "missing_keys": wanted.keys() - listed,
        "unexpected_keys": [
            name
            for name in listed - wanted.keys()
            if not any(re.search(pattern, name) for pattern in ignored)
        ],
        "mismatched_keys": [
            (name, shape, wanted[name])
            for name, shape in there.items()
            if name in wanted and shape != wanted[name]
        ],
    }


def _empty_encoder(kind: Any, files: ComponentFiles) -> tuple[nn.Module, dict[str, Any]]:
    """A text encoder without weights, and what transformers finds of them, by its own renaming and tying."""
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in files.shapes.items()}
    made: tuple[nn.Module, dict[str, Any]] = kind.from_pretrained(
        None,
        config=kind.config_class.from_pretrained(str(files.folder)),
        state_dict=weights,
        device_map={"": "meta"},
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return made
