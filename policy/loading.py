"""From a pipeline on disk or on the hub to the stock pipeline's parts, checked before any weight is read.

Promises
- Which components there must be, and of which classes, is said in one place (`Parts`); what differs is a
  PolicyError that names what was found and what would be valid.
- What is not asked for (text encoders, VAE) is not loaded.
- Nothing is printed: diffusers' and transformers' progress bars and warnings are off while loading, and their
  settings are put back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from policy.errors import PolicyError
from services.config import ModelConfig

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


@dataclass(frozen=True)
class Configs:
    """The configurations of components, as their config.json have them; weights are not read for them."""

    denoiser: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]


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

    classes: Any = diffusers
    try:
        denoiser, vae = (
            getattr(classes, parts.classes[name]).load_config(
                location, subfolder=name, revision=config.revision
            )
            for name in (parts.denoiser, "vae")
        )
        # Of whatever class it is: only its JSON is read.
        scheduler = classes.EulerDiscreteScheduler.load_config(
            location, subfolder="scheduler", revision=config.revision
        )
    except (OSError, ValueError) as error:
        raise PolicyError(f"model.path {location}: cannot be loaded: {error}") from error
    return Configs(denoiser=denoiser, vae=vae, scheduler=scheduler)


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
    pipeline_class: Any = getattr(diffusers, parts.pipeline)
    try:
        with quiet():
            pipeline = pipeline_class.from_pretrained(
                location,
                revision=config.revision,
                dtype=getattr(torch, config.dtype),
                # Nothing is unpickled: weights in another format are refused.
                use_safetensors=True,
                **absent,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise PolicyError(f"model.path {location}: cannot be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
