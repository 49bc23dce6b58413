"""From a pipeline on disk or on the hub to the stock pipeline's parts, checked before any weight is read.

Promises
- Which components there must be, and of which classes, is said in one place (`Parts`); what differs is a
  PolicyError that names what was found and what would be valid.
- What is not asked for (text encoders, VAE) is not loaded; what is loaded is whole (policy/whole.py).
- Nothing is printed: diffusers' and transformers' progress bars and warnings are off while loading (and while
  their modules are imported, which warns of what is not installed), and their settings are put back. What
  the hub's client says of the hub is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from policy.component_files import check_vocabulary
from policy.errors import PolicyError
from policy.whole import check_finite, check_whole, load_whole, read_component
from services.config import ModelConfig
from services.safetensors_layout import ALIGNMENT_BYTES

TextParts = Literal["all", "tokenizers", "none"]
"""Encoders and tokenizers, tokenizers alone, or none of both."""


@dataclass(frozen=True)
class Parts:
    """The components of a pipeline class."""

    pipeline: str
    """The class, as model_index.json has it."""
    denoiser_class: str
    vae_class: str
    encoders: Mapping[str, str]
    """Text encoders, component -> class."""
    tokenizers: tuple[str, ...]
    denoiser: str = "transformer"
    """The component that is trained."""
    optional: frozenset[str] = field(default_factory=frozenset)
    """Text components that a pipeline may lack."""

    @property
    def text(self) -> tuple[str, ...]:
        """Text components."""
        return (*self.encoders, *self.tokenizers)

    @property
    def classes(self) -> dict[str, str]:
        """Component -> class, of all whose class matters."""
        return {self.denoiser: self.denoiser_class, "vae": self.vae_class, **self.encoders}


@dataclass(frozen=True)
class Geometry:
    """What an image of some size is to the denoiser."""

    channels: int
    """Of the latents."""
    compression: int
    """Pixels of a side that are one latent."""
    patch: int = 1
    """Latents of a side that are one token."""
    multiple: int = 1
    """Of pixels, beside compression * patch: what the stock pipeline asks of height and width."""

    def latent_shape(self, config: ModelConfig) -> tuple[int, int, int]:
        """(C, h, w) of one image.

        Raises:
            PolicyError: height or width are not multiples of what they must be multiples of.
        """
        multiple = math.lcm(self.compression * self.patch, self.multiple)
        if config.height % multiple or config.width % multiple:
            raise PolicyError(
                f"model.height {config.height} and model.width {config.width} must be multiples of {multiple}"
            )
        return self.channels, config.height // self.compression, config.width // self.compression

    def tokens(self, config: ModelConfig) -> int:
        """Image tokens of one image."""
        _, height, width = self.latent_shape(config)
        return (height // self.patch) * (width // self.patch)


class Settings(dict[str, Any]):
    """What a JSON file says; what it should say and does not is a PolicyError."""

    def __init__(self, found: Mapping[str, Any], told: str) -> None:
        super().__init__(found)
        self._told = told

    def __missing__(self, key: str) -> Any:
        raise PolicyError(
            f"{self._told} has no {key!r}; it must be the one that the weights were saved with: download or "
            "copy it again"
        )


@dataclass(frozen=True)
class Configs:
    """The configurations of components, as their config.json have them; weights are not read for them."""

    denoiser: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]


@dataclass(frozen=True)
class CheckedFiles:
    """The files of a local pipeline, none of which was found wanting."""

    files: list[Path] = field(default_factory=list)
    """Of weights."""
    unclear: dict[str, str] = field(default_factory=dict)
    """Components whose headers do not tell whether they hold what the configuration describes, and why."""


def check_index(parts: Parts, location: str, index: Mapping[str, Any], *, text_encoders: bool) -> None:
    """Whether the components that are needed are there, and of the right classes.

    Raises:
        PolicyError: one is not.
    """
    needed = [parts.denoiser, "vae", "scheduler"]
    if text_encoders:
        needed += [name for name in parts.text if name not in parts.optional]
    missing = [name for name in needed if _class(index, name) is None]
    if missing:
        raise PolicyError(
            f"model.path {location}: model_index.json has no {', '.join(missing)}; "
            f"a {parts.pipeline} needs {', '.join(needed)}"
        )
    for name, wanted in parts.classes.items():
        found = _class(index, name)
        if found is not None and found != wanted:
            raise PolicyError(
                f"model.path {location}: the {name} of a {parts.pipeline} must be of class {wanted}, "
                f"found {found}"
            )


def read_configs(parts: Parts, config: ModelConfig, location: str) -> Configs:
    """The configurations of the denoiser, the VAE and the scheduler.

    Raises:
        PolicyError: one cannot be read.
    """
    import diffusers

    # A scheduler's is only read, of whatever class it is.
    kinds = {name: parts.classes[name] for name in (parts.denoiser, "vae")}
    kinds["scheduler"] = "EulerDiscreteScheduler"
    found = []
    for name, kind in kinds.items():
        source: Any = getattr(diffusers, kind)
        try:
            with quiet():
                read = source.load_config(location, subfolder=name, revision=config.revision)
        except (OSError, ValueError) as error:
            raise PolicyError(f"model.path {location}: cannot be loaded: {error}") from error
        found.append(Settings(read, f"model.path {location}: {name}/{source.config_name}"))
    return Configs(*found)


def load_pipeline(
    parts: Parts,
    config: ModelConfig,
    location: str,
    index: Mapping[str, Any],
    *,
    text_encoders: TextParts,
    vae: bool,
    denoiser: bool = True,
) -> Any:
    """The stock pipeline in the dtype of the configuration, on the CPU.

    Raises:
        PolicyError: it cannot be loaded.
    """
    import diffusers

    absent: dict[str, None] = {name: None for name in parts.optional if _class(index, name) is None}
    if text_encoders != "all":
        absent |= dict.fromkeys(parts.text if text_encoders == "none" else parts.encoders)
    if not vae:
        absent["vae"] = None
    if not denoiser:
        absent[parts.denoiser] = None
    where = f"model.path {location}"
    try:
        with quiet():
            pipeline_class: Any = getattr(diffusers, parts.pipeline)
            folder = Path(location)
            if not folder.is_dir():
                folder = Path(
                    pipeline_class.download(
                        location, revision=config.revision, use_safetensors=True, **absent
                    )
                )
            loaded = {
                name: _component(parts, name, f"{where}: the {name}", folder / name, index, config)
                for name in (*parts.classes, *parts.tokenizers)
                if name not in absent
            }
            pipeline = pipeline_class.from_pretrained(folder, **loaded, **absent)
    except PolicyError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise PolicyError(f"{where}: cannot be loaded: {error}") from error
    pipeline.register_to_config(_name_or_path=location)
    if find_device(config.device).type == "cpu":
        align(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _component(
    parts: Parts, name: str, told: str, folder: Path, index: Mapping[str, Any], config: ModelConfig
) -> Any:
    """A component that has a class of its own: weights, or a vocabulary."""
    kind = _kind(parts, name, told, index)
    if name not in parts.tokenizers:
        return load_whole(told, kind, folder, getattr(torch, config.dtype))
    check_vocabulary(told, folder)
    return read_component(told, kind, folder)


def _kind(parts: Parts, name: str, told: str, index: Mapping[str, Any]) -> Any:
    """The class of a component."""
    import diffusers
    import transformers

    library: Any = transformers if name in parts.text else diffusers
    kind = getattr(library, str(_class(index, name)), None)
    if kind is None:
        raise PolicyError(
            f"{told} is of a class that {library.__name__} does not have: {_class(index, name)}"
        )
    return kind


def check_files(parts: Parts, directory: Path, index: Mapping[str, Any]) -> CheckedFiles:
    """Whether a local pipeline could be loaded whole, as far as headers and vocabularies tell.

    Raises:
        PolicyError: it could not.
    """
    check_index(parts, str(directory), index, text_encoders=True)
    checked = CheckedFiles()
    with quiet():
        for name in (*parts.classes, *parts.tokenizers):
            if _class(index, name) is None:
                continue
            told, folder = f"model.path {directory}: the {name}", directory / name
            kind = _kind(parts, name, told, index)
            if name in parts.tokenizers:
                check_vocabulary(told, folder)
                continue
            files, unclear = check_whole(told, kind, folder)
            checked.files.extend(files.headers)
            if unclear:
                checked.unclear[name] = unclear
    return checked


def check_numbers(pipeline: Any, parts: Parts, location: str) -> None:
    """Whether all weights of what is loaded are finite.

    Raises:
        PolicyError: one is not.
    """
    for name in parts.classes:
        component = getattr(pipeline, name, None)
        if component is not None:
            check_finite(f"model.path {location}: the {name}", component)


def empty_denoiser(parts: Parts, configs: Configs) -> nn.Module:
    """The denoiser without any weights: it knows its configuration and takes no memory."""
    import diffusers

    denoiser_class: Any = getattr(diffusers, parts.denoiser_class)
    with torch.device("meta"):
        made: nn.Module = denoiser_class.from_config(configs.denoiser)
    return made.requires_grad_(False)


def place(pipeline: Any, parts: Parts, config: ModelConfig, *, denoiser: bool = True) -> None:
    """Move the pipeline to its device; text encoders where `model.text_encoders` wants them.

    Args:
        denoiser: that one too.
    """
    device = find_device(config.device)
    encoders = config.text_encoders == "device"
    if encoders and denoiser:
        pipeline.to(device)
        return
    for name in (*([parts.denoiser] if denoiser else []), "vae", *(parts.encoders if encoders else [])):
        component = getattr(pipeline, name)
        if component is not None:
            component.to(device)


def align(pipeline: Any) -> None:
    """Copies the weights of a stock pipeline that are not aligned as torch's own memory is: where their file
    was mapped.

    Kernels for misaligned memory may add up in another order: last digits would depend on where in a file a
    weight is, and would not be the same after it has moved.
    """
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            for tensor in (*component.parameters(), *component.buffers()):
                if tensor.is_cpu and tensor.data_ptr() % ALIGNMENT_BYTES:
                    tensor.data = tensor.detach().clone()


def find_device(name: str) -> torch.device:
    """The device of `model.device`.

    Raises:
        PolicyError: there is none of that name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PolicyError(f"model.device {name!r}: not a device; valid: auto, cpu, cuda, cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PolicyError(f"model.device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


@contextmanager
def quiet() -> Iterator[None]:
    """Errors only, and no progress bars, from diffusers and transformers; their settings are put back."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        with warnings.catch_warnings():
            # diffusers' own: it hands the hub's client an argument that this has no use for any more.
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument", UserWarning)
            yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def _class(index: Mapping[str, Any], name: str) -> str | None:
    """Of a component; None: the pipeline has none."""
    entry = index.get(name)
    return entry[1] if isinstance(entry, (list, tuple)) and len(entry) == 2 else None
