"""Are the files of a component whole, and is all of it in them? The libraries ask neither.

Promises
- A file that is cut short or that its index contradicts, a weight that is in no file, one that the
  configuration has no place for, and one that is not a number are a PolicyError that names component, file
  and weights: no weight of a model is ever a random one.
- Names come from the headers of the files: of weights nothing is read but what is loaded anyway.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from policy.errors import PolicyError

DENOISER_FILE: Final = "diffusion_pytorch_model.safetensors"
"""As diffusers calls the weights of a component."""
ENCODER_FILE: Final = "model.safetensors"
"""As transformers does."""
VOCABULARIES: Final = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
"""What may hold the words of a tokenizer; without any the library makes one that knows none."""
REMEDY: Final = "download or copy it again, or save the pipeline again with save_pretrained"
MEND: Final = "config.json must be the one that the weights were saved with"
SHOWN: Final = 3
FLOATS: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")


def check_weights(told: str, folder: Path, name: str) -> list[Path]:
    """The files that a library reads of a component; of each only its header is read.

    Args:
        told: the component, for the error.
        name: of the file, if there is one alone.

    Raises:
        PolicyError: there are none, or one is not whole.
    """
    if name == ENCODER_FILE:
        _check_config(told, folder / "config.json")
    alone, index = folder / name, folder / f"{name}.index.json"
    # Of both diffusers takes the shards, transformers the one file.
    if alone.is_file() and (name == ENCODER_FILE or not index.is_file()):
        _names(told, alone)
        return [alone]
    if not index.is_file():
        raise PolicyError(
            f"{told} cannot be loaded: no file named {name}, and no {index.name}, in {folder}; weights must "
            "be safetensors, nothing is unpickled"
        )
    places = _places(told, index)
    files = sorted({folder / file for file in places.values()})
    for file in files:
        if not file.is_file():
            raise PolicyError(f"{told} is not whole: {file} is missing, which {index.name} names; {REMEDY}")
        there = _names(told, file)
        lacks = [weight for weight, place in places.items() if folder / place == file and weight not in there]
        if lacks:
            raise PolicyError(
                f"{told} is not whole: {file} lacks {_told(lacks)}, which {index.name} says are in it (is it "
                f"a copy of another shard?); {REMEDY}"
            )
    return files


def check_vocabulary(told: str, folder: Path) -> None:
    """Whether a tokenizer has words.

    Raises:
        PolicyError: no file of it holds any.
    """
    if not any((folder / file).is_file() for file in VOCABULARIES):
        raise PolicyError(
            f"{told} has no vocabulary: {folder} holds none of {', '.join(VOCABULARIES)}; {REMEDY}"
        )


def load_whole(told: str, kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A component of stock code, on the CPU, every weight of it from its files.

    Args:
        told: the component, for the error.
        kind: its class, of diffusers or transformers.

    Raises:
        PolicyError: its files are not whole, or not of what its configuration describes.
    """
    ours = kind.__module__.startswith("diffusers.")
    (file, *more) = check_weights(told, folder, DENOISER_FILE if ours else ENCODER_FILE)
    # Of other shapes transformers says only in its log which they are, unless it is to replace them.
    how: dict[str, Any] = (
        {"torch_dtype": dtype} if ours else {"dtype": dtype, "ignore_mismatched_sizes": True}
    )
    # Nothing is unpickled: weights in another format are refused.
    how |= {"use_safetensors": True, "output_loading_info": True}
    model, found = read_component(told, kind, folder, **how)
    place = f"{folder} ({1 + len(more)} files)" if more else str(file)
    missing, surplus = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        raise PolicyError(
            f"{told} is not whole: {place} lacks {_told(missing)}, of the {len(model.state_dict())} that its "
            f"config.json describes; {REMEDY}; {MEND}"
        )
    for weight, there, wanted in sorted(found["mismatched_keys"]):
        raise PolicyError(
            f"{told} is not what its config.json describes: in {place} {weight} is {tuple(there)}, expected "
            f"{tuple(wanted)}; {MEND}"
        )
    if not ours:
        # Heads that a text encoder does not use may lie beside it; a layer more may not.
        known = {_NUMBER.sub("*", weight) for weight in model.state_dict()}
        surplus = [weight for weight in surplus if _NUMBER.sub("*", weight) in known]
    if surplus:
        raise PolicyError(
            f"{told} is not what its config.json describes: {place} also holds {_told(surplus)}, for which "
            f"it has no place (too few layers?); {MEND}"
        )
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
            f"{told} has weights that are not finite (NaN or infinite): {_told(wrong)}; {REMEDY}, or set "
            "model.dtype to one that holds them"
        )


def _check_config(told: str, file: Path) -> None:
    """Of a text encoder: of an empty one transformers would make its own, of any size."""
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PolicyError(
            f"{told} cannot be loaded: {file} does not say of which model_type it is ({error!r}); {MEND}"
        ) from error
    if not isinstance(kind, str):
        raise PolicyError(f"{told} cannot be loaded: {file} has model_type {kind!r}, expected a name; {MEND}")


def _names(told: str, file: Path) -> set[str]:
    """Of the weights in a file, by its header, which is held against the file's size."""
    try:
        with safe_open(file, "pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise PolicyError(
            f"{told} cannot be loaded: {file} is no whole safetensors file ({file.stat().st_size} bytes): "
            f"{error}; {REMEDY}"
        ) from error


def _places(told: str, index: Path) -> dict[str, str]:
    """Weight -> file, of an index of shards."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found = {str(weight): str(file) for weight, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PolicyError(
            f"{told} cannot be loaded: {index} is no index of shards (an object with a weight_map): "
            f"{error!r}; {REMEDY}"
        ) from error
    if not found:
        raise PolicyError(f"{told} is not whole: the weight_map of {index} names no weight; {REMEDY}")
    return found


def _told(weights: Iterable[str]) -> str:
    """'5 weights: a, b, c, ...'"""
    names = list(weights)
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} weight{'s' if len(names) > 1 else ''}: {', '.join(names[:SHOWN])}{more}"
