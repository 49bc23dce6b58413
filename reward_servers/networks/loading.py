"""What scorers that are torch networks share: their arguments, where weights come from, how they are loaded.

Promises
- Weights come from a local directory or a hub id, at a revision if one is given; no code that lies beside
  them is run, and from a pickle only tensors and plain values are taken.
- A checkpoint that lacks a weight of the network, or has another shape, is refused: a scorer never answers
  with random numbers.
- Output that is not finite is an error of its image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file

from reward_servers.scorer import ItemScore, Scorer, ScorerOptions

Network = TypeVar("Network", bound=nn.Module)
Item = TypeVar("Item")
Options = TypeVar("Options", bound="NeuralOptions")


class NeuralOptions(ScorerOptions):
    """Arguments of every scorer that is a torch network."""

    # `dtype` is not among them: bfloat16 moves a score by more than models differ.
    neutral: ClassVar[frozenset[str]] = frozenset({"device", "max_batch"})

    revision: str | None = None
    """Commit, tag or branch, where the weights come from the hub."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and activations; the formula itself is computed in float32."""
    max_batch: int = Field(default=16, ge=1)
    """Images that go through the network at once."""

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def neural_options(kind: type[Options], args: dict[str, Any], threads: int) -> Options:
    """The arguments of a scorer, validated; torch, which has one setting a process, gets its threads."""
    options = kind.model_validate(args)
    torch.set_num_threads(threads)
    return options


class NeuralScorer(Scorer):
    """A scorer that is a torch network, made with the threads of `neural_options`."""

    batch_invariant = False
    threaded = True
    options: NeuralOptions

    def __init__(self, options: NeuralOptions, model: str) -> None:
        self.options = options
        self.model = model
        self.max_batch = options.max_batch

    def item(self, score: float, details: dict[str, Any] | None = None) -> ItemScore:
        """The score of an image, or why there is none."""
        return ItemScore(score, details or {}) if math.isfinite(score) else self.not_finite()

    def not_finite(self, what: str = "the network's output") -> ItemScore:
        """For an image whose output is infinite or no number."""
        finer = "" if self.options.dtype == "float32" else "; try dtype float32"
        return ItemScore(None, error=f"{what} is not finite in {self.options.dtype}{finer}")


def weights_name(source: str, revision: str | None) -> str:
    """How a network's weights are told: where they are from, and at which revision.

    >>> weights_name("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
    'openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41'
    """
    return source if revision is None else f"{source}@{revision}"


def load_network(kind: type[Network], source: str, options: NeuralOptions) -> Network:
    """A frozen network in the format of transformers, on its device.

    Args:
        kind: class of transformers.
        source: local directory or hub id.

    Raises:
        ValueError: it cannot be loaded, or the checkpoint lacks weights of the network.
    """
    load: Any = kind
    network: Network
    try:
        require_place(source)
        _require_kind(load, source, options.revision)
        network, found = load.from_pretrained(
            source,
            revision=options.revision,
            dtype=options.torch_dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ValueError(f"{source}: no {kind.__name__} could be loaded from there: {error}") from error
    missing = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} weights of {kind.__name__} are missing or of another shape, "
            f"such as {missing[0]}: this is the checkpoint of another network"
        )
    return frozen(network, options)


def _require_kind(kind: Any, source: str, revision: str | None) -> None:
    """transformers would make a network of default size of another's configuration, and only warn."""
    expected = kind.config_class
    config, _ = expected.get_config_dict(source, revision=revision)
    found = config.get("model_type", expected.model_type)
    if found != expected.model_type:
        raise ValueError(f"it is a checkpoint of {found!r}, not of {expected.model_type!r}")


def require_place(source: str) -> None:
    """Refuse a path that is not there, which the hub would take for a misspelt id.

    Raises:
        ValueError: `source` can only be a local path, and nothing is there.
    """
    path = Path(source)
    if (path.is_absolute() or source.startswith(".") or len(path.parts) > 2) and not path.exists():
        raise ValueError(f"{source}: no such file or directory")


def weight_file(source: str, name: str, revision: str | None = None) -> Path:
    """Where a file of weights lies: `source` if it is a file, else `name` in that directory or hub id.

    Raises:
        ValueError: there is none.
    """
    require_place(source)
    if Path(source).is_file():
        return Path(source)
    try:
        return Path(cached_file(source, name, revision=revision))
    except Exception as error:
        raise ValueError(f"{source}: no file {name} there: {error}") from error


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pt file, on the CPU; those under `state_dict`, where there is one.

    Raises:
        ValueError: it cannot be read, or holds other objects than tensors and plain values.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found: object = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{file}: no weights could be read from it: {error}") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{file}: expected a dictionary of tensors, found {type(found).__name__}")
    others = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{file}: {others[0]} is no tensor: this is no state dict")
    return {str(name): value for name, value in found.items()}


def frozen(network: Network, options: NeuralOptions) -> Network:
    """In evaluation mode, without gradients, in the dtype and on the device of the options."""
    try:
        return network.eval().requires_grad_(False).to(device=options.device, dtype=options.torch_dtype)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device {options.device!r}: {error}") from error


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """`items` in parts of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
