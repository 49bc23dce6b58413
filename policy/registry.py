"""From a model directory to a policy: the family is chosen by `_class_name` in model_index.json.

Promises
- A missing directory, a missing component, a wrong class or an unknown pipeline is a PolicyError that says
  what was found and what would be valid; nothing is loaded halfway.
- Adding a family is adding one file to policy/families/ (docs/models.md).
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from policy import families, loading
from policy.errors import PolicyError
from policy.loading import CheckedFiles, Configs
from policy.pipeline_policy import PipelinePolicy
from services.config import Config, ModelConfig
from services.config_file import find

SLOW_TO_LOAD: Final = 1 << 30
"""Bytes of weights. A smaller model is loaded, and refused, about as soon as its files are looked at."""


def load_policy(
    config: ModelConfig,
    *,
    text_encoders: bool,
    vae: bool,
    base: bool = True,
    seed: int = 0,
    to_shard: bool = False,
    condition_cache: Path | None = None,
) -> PipelinePolicy:
    """Load the model of the `model` section.

    Args:
        config: the section; a relative path is sought in the working directory and beside the packages.
        text_encoders: load what `encode` needs.
        vae: load what `decode` needs.
        base: with `train: full`, keep a frozen copy of the weights for `Policy.base()`.
        seed: of the adapters' start; every process of a run uses the same.
        to_shard: leave the denoiser on the CPU, from where `Policy.shard` takes it block by block.
        condition_cache: directory of encoded prompts: text encoders are loaded only for prompts that it does
            not have (services/conditions.py); None: if they are asked for, for good.

    Raises:
        PolicyError: it cannot be loaded; the text says why and what would be valid.
    """
    location, index = _locate(config)
    return _family(location, index).load(
        *(config, location, index),
        text_encoders=text_encoders,
        vae=vae,
        base=base,
        seed=seed,
        to_shard=to_shard,
        condition_cache=condition_cache,
    )


def load_encoders(config: ModelConfig, condition_cache: Path) -> PipelinePolicy:
    """Load of a model what fills a directory of encoded prompts; it can encode, and nothing else.

    Raises:
        PolicyError: as `load_policy`.
    """
    location, index = _locate(config)
    return _family(location, index).load_encoders(config, location, index, condition_cache)


def stock_rollout(config: ModelConfig) -> dict[str, object]:
    """The keys of the `rollout` section with which rollouts step as the stock pipeline does by default.

    Reads configurations only, no weights; where the shift depends on the image size, it is that of `config`.

    Raises:
        PolicyError: as `load_policy`.
    """
    family, configs = read_family(config)
    return family.stock_rollout(config, configs)


def read_family(config: ModelConfig) -> tuple[type[PipelinePolicy], Configs]:
    """Family and configurations of a pipeline; no weights are read.

    Raises:
        PolicyError: as `load_policy`.
    """
    location, index = _locate(config)
    family = _family(location, index)
    return family, family.read_configs(config, location, index, text_encoders=False)


def check_sampling(config: Config) -> None:
    """Whether a run's groups, evaluations and exported pipelines can be sampled as they are configured.

    Reads configurations only, no weights; of a hub id nothing, so that it is refused only when it is loaded.

    Raises:
        PolicyError: a component or a setting of the sampler does not fit; the text says what would.
    """
    if not find(config.model.path).is_dir():
        return
    family, _ = read_family(config.model)
    if config.model.revision is not None:
        raise PolicyError(
            f"model.revision {config.model.revision!r}: model.path {config.model.path} is a directory here, "
            "which has no revision: leave it out"
        )
    # Groups of a recording have been sampled already.
    for rollout in (
        (config.evaluation_rollout,) if config.offline else (config.rollout, config.evaluation_rollout)
    ):
        family.check_rollout(rollout)


def check_files(config: ModelConfig, *, at_least: int = 0) -> CheckedFiles:
    """Whether a local model could be loaded whole: its headers, indices and vocabularies; no weight is read.

    Of a hub id nothing, so that it is refused only when it is loaded.

    Args:
        at_least: nor of one whose weights are fewer bytes.

    Raises:
        PolicyError: as `load_policy`.
    """
    directory = find(config.path)
    if not directory.is_dir():
        return CheckedFiles()
    if at_least and _bytes_of_weights(directory) < at_least:
        return CheckedFiles()
    location, index = _locate(config)
    return loading.check_files(_family(location, index).parts, Path(location), index)


def _bytes_of_weights(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors") if file.is_file())


def supported() -> dict[str, type[PipelinePolicy]]:
    """Pipeline class name -> family."""
    found: dict[str, type[PipelinePolicy]] = {}
    for module in pkgutil.iter_modules(families.__path__):
        for family in importlib.import_module(f"{families.__name__}.{module.name}").FAMILIES:
            found[family.parts.pipeline] = family
    return found


def _family(location: str, index: Mapping[str, Any]) -> type[PipelinePolicy]:
    known, name = supported(), str(index.get("_class_name"))
    if name not in known:
        raise PolicyError(
            f"model.path {location}: pipeline class {name!r} is not supported; "
            f"supported: {', '.join(sorted(known))}"
        )
    return known[name]


def _locate(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    directory = find(config.path)
    if directory.is_dir():
        return str(directory), _read_index(directory)
    if not _may_be_hub_id(config.path):
        raise PolicyError(
            f"model.path {config.path!r}: no such directory; give a directory in diffusers format "
            "(with a model_index.json), or a hub id such as stabilityai/stable-diffusion-3.5-medium"
        )
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with loading.quiet():
            index = DiffusionPipeline.load_config(config.path, revision=config.revision)
    except Exception as error:
        told = (
            f"model.path {config.path!r} (revision {config.revision}): no such directory here, and the model "
            "hub"
        )
        # diffusers says that the file is not there, of a hub that was not asked too.
        if isinstance(error.__cause__ or error.__context__, LocalEntryNotFoundError):
            raise PolicyError(
                f"{told} cannot be reached, or is switched off (HF_HUB_OFFLINE); nor is it in its cache"
            ) from error
        raise PolicyError(f"{told} has no usable pipeline of that name: {error}") from error
    return config.path, dict(index)


def _read_index(directory: Path) -> dict[str, Any]:
    file = directory / "model_index.json"
    if not file.is_file():
        raise PolicyError(
            f"model.path {directory}: no model_index.json; give a pipeline saved by diffusers "
            "(`pipeline.save_pretrained(directory)`), not a single component"
        )
    try:
        index = json.loads(file.read_text())
    except ValueError as error:
        raise PolicyError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(index, dict):
        raise PolicyError(f"{file}: expected an object, found {type(index).__name__}")
    for name, value in index.items():
        named = isinstance(value, list) and len(value) == 2 and value[0] is not None
        if not name.startswith("_") and named and not (directory / name).is_dir():
            raise PolicyError(
                f"model.path {directory}: model_index.json names {name}, but {directory / name} is missing"
            )
    return index


def _may_be_hub_id(path: str) -> bool:
    # A folder that exists here makes it a mistyped path: say so at once instead of asking the hub.
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and not path.startswith((".", "~")) and not find(parts[0]).exists()
