"""The files of a component, as far as they tell of themselves: which weights and of what shape, which words.

Promises
- A file that is cut short or that its index contradicts, and a tokenizer that knows no word, are a
  PolicyError that names component, file and weights.
- Of weights only headers are read, and nothing is mapped: a file may be larger than the memory here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from policy.errors import PolicyError

DENOISER_FILE: Final = "diffusion_pytorch_model.safetensors"
"""As diffusers calls the weights of a component."""
ENCODER_FILE: Final = "model.safetensors"
"""As transformers does."""
FAST_TOKENIZER: Final = "tokenizer.json"
VOCABULARIES: Final = (FAST_TOKENIZER, "vocab.json", "spiece.model", "tokenizer.model")
"""What may hold the words of a tokenizer; without any the library makes one that knows none."""
REMEDY: Final = "download or copy it again, or save the pipeline again with save_pretrained"
MEND: Final = "config.json must be the one that the weights were saved with"
SHOWN: Final = 3

Shapes = dict[str, tuple[int, ...]]
"""Weight -> shape."""


@dataclass(frozen=True)
class ComponentFiles:
    """What a library reads of a component."""

    folder: Path
    headers: Mapping[Path, Shapes]
    """By file, in the order in which they are read."""
    listed: frozenset[str] | None
    """The weights that an index names; None: there is none, and one file."""

    @property
    def shapes(self) -> Shapes:
        """Of all weights that are in the files."""
        return {weight: shape for header in self.headers.values() for weight, shape in header.items()}

    def place(self, weights: Iterable[str] = ()) -> str:
        """The one file that has weights; the folder, if it is not one or they have other names there."""
        holders = [{file for file, header in self.headers.items() if weight in header} for weight in weights]
        files = set().union(*holders) if holders and all(holders) else set(self.headers)
        return str(*files) if len(files) == 1 else f"{self.folder} ({len(self.headers)} files)"


def check_weights(told: str, folder: Path, name: str) -> ComponentFiles:
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
        return ComponentFiles(folder, {alone: _header(told, alone)}, None)
    if not index.is_file():
        raise PolicyError(
            f"{told} cannot be loaded: no file named {name}, and no {index.name}, in {folder}; weights must "
            "be safetensors, nothing is unpickled"
        )
    places = _places(told, index)
    headers = {}
    for file in sorted({folder / file for file in places.values()}):
        if not file.is_file():
            raise PolicyError(f"{told} is not whole: {file} is missing, which {index.name} names; {REMEDY}")
        headers[file] = there = _header(told, file)
        lacks = [weight for weight, place in places.items() if folder / place == file and weight not in there]
        if lacks:
            raise PolicyError(
                f"{told} is not whole: {file} lacks {counted(lacks)}, which {index.name} says are in it (is "
                f"it a copy of another shard?); {REMEDY}"
            )
    return ComponentFiles(folder, headers, frozenset(places))


def check_vocabulary(told: str, folder: Path) -> None:
    """Whether a tokenizer has words.

    Raises:
        PolicyError: no file of it holds any.
    """
    there = [folder / file for file in VOCABULARIES if (folder / file).is_file()]
    if not there:
        raise PolicyError(
            f"{told} has no vocabulary: {folder} holds none of {', '.join(VOCABULARIES)}; {REMEDY}"
        )
    # Of several files it is for the library to say which it takes.
    if not any(_has_words(file) for file in there):
        raise PolicyError(
            f"{told} has no vocabulary: no word is in {' or '.join(map(str, there))} "
            f"({there[0].stat().st_size} bytes); {REMEDY}"
        )


def counted(weights: Iterable[str]) -> str:
    """'5 weights: a, b, c, ...'"""
    names = list(weights)
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} weight{'s' if len(names) > 1 else ''}: {', '.join(names[:SHOWN])}{more}"


def _has_words(file: Path) -> bool:
    if file.suffix != ".json":
        return file.stat().st_size > 0
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    if file.name != FAST_TOKENIZER:
        return bool(found)
    if not isinstance(found, dict):
        return False
    model, added = found.get("model"), found.get("added_tokens")
    words = isinstance(model, dict) and bool(model.get("vocab"))
    return words or any(not token.get("special") for token in added or () if isinstance(token, dict))


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


def _header(told: str, file: Path) -> Shapes:
    """Of the weights in a file; its header is held against its size."""
    try:
        # Not mapped: of a file that is larger than its memory a machine refuses that.
        with safe_open(file, "pt", backend="pread") as opened:
            return {weight: tuple(opened.get_slice(weight).get_shape()) for weight in opened.keys()}  # noqa: SIM118
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
