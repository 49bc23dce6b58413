"""`dgpo encode`: all prompts of a recipe are encoded before it is trained; no worker ever loads an encoder.

Promises
- Loads text encoders and tokenizers, and nothing else of the model; none of them where nothing is missing.
- What is there already stays; what does not fit the disk is refused as soon as the first prompt has shown its
  size.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from services.conditions import condition_cache, prompts_of
from services.config import Config
from services.config_file import ConfigError
from services.prompts import prompt_source


def encode_prompts(config: Config, screen: Console) -> dict[str, Any]:
    """Encode what a run of `config` will ask for.

    Returns:
        `directory`, `prompts` of the run, how many were `encoded` now, and `bytes_a_prompt`, of the first.

    Raises:
        ConfigError: the recipe keeps no encoded prompts, samples nothing, or the disk has no room for them.
    """
    from policy import load_encoders

    directory = condition_cache(config)
    if directory is None:
        raise ConfigError(
            f"model.text_encoders is {config.model.text_encoders!r}: nothing would look for encoded prompts; "
            "set it to cached"
        )
    if config.offline:
        raise ConfigError("prompts.source recorded: the groups of a recording bring their prompts encoded")
    texts = list(prompts_of(config, prompt_source(config)))
    encoders = load_encoders(config.model, directory)
    missing = [text for text in texts if not encoders.prepared(text)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen) as progress:
        task = progress.add_task("encoding prompts", total=len(missing))

        def done(text: str) -> None:
            if text == missing[0]:
                _check_room(directory, len(missing) - 1, _bytes(encoders.encode(text)))
            progress.advance(task)

        guided = max(config.rollout.guidance, config.objective.guided_base) > 1
        encoders.prepare(missing, negative=guided, done=done)
    return {
        "directory": str(directory),
        "prompts": len(texts),
        "encoded": len(missing),
        "bytes_a_prompt": _bytes(encoders.encode(texts[0])),
    }


def _check_room(directory: Path, prompts: int, each: int) -> None:
    free = shutil.disk_usage(directory).free
    if prompts * each > free:
        raise ConfigError(
            f"{directory}: {prompts} prompts of {each / 1e6:.2f} MB each do not fit into the "
            f"{free / 1e9:.2f} GB that are free; give them another place with model.condition_cache"
        )


def _bytes(condition: dict[str, Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in condition.values())
