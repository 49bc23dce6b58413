"""The model card of an export: what it is, how it came about, and how to call it with stock diffusers.

Promises
- Its code runs as it stands, but for the place of a base model that was a local folder: a card is published,
  so it tells no path of this machine, but has a place to fill in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from policy.base_digest import base_digest
from policy.pipeline_policy import PipelinePolicy
from services.config import AnyObjective, DgpoConfig, ModelConfig, RolloutConfig
from services.config_file import find

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags:
- text-to-image
{tags}{base_model}---

# {title}

{what} post-trained with {method}
([arXiv {source}](https://arxiv.org/abs/{source})) by dgpo-cluster.

## Use

With diffusers 0.42 or newer{needs}:

```python
import torch
from diffusers import {imports}

{load}
image = pipeline(
    {prompt!r},
{arguments}
    generator=torch.Generator().manual_seed(0),
).images[0]
```

{notes}

## Training

| | |
| --- | --- |
{facts}
{sections}"""

BFLOAT16_NOTE = (
    "Give `dtype` as above: without it parts of the pipeline are loaded in different ones, and most families "
    "fail. An image differs a little from that of an evaluation with the same seed: there latents "
    "between the steps are float32, and trained weights too until they are multiplied; here all is bfloat16."
)
WIDTH = 100
"""Of a line of code."""


@dataclass(frozen=True)
class Training:
    """How a model came about."""

    objective: type[AnyObjective] = DgpoConfig
    name: str = ""
    """Of the run."""
    prompt: str = "a photo of a red bicycle"
    """An example."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """Rows of the card's table (run, updates, images)."""
    sections: str = ""
    """Further sections (scores, recipe), Markdown."""


def write_card(
    policy: PipelinePolicy,
    directory: Path,
    rollout: RolloutConfig,
    training: Training | None,
    *,
    imports: str,
    load: str,
) -> None:
    """Write README.md into an exported directory.

    Args:
        imports: names from diffusers that `load` needs.
        load: Python that makes `pipeline`.
    """
    config, told = policy.config, training or Training()
    lora, method = directory.name == "lora", told.objective.method
    local, what = _is_local(config), f"`{type(policy.pipeline).__name__}`"
    tags = [re.sub(r"[^a-z0-9]+", "-", method.lower()), *(["lora"] if lora else [])]
    relation = "adapter" if lora else "finetune"
    text = CARD.format(
        tags="".join(f"- {tag}\n" for tag in tags),
        base_model="" if local else f"base_model: {config.path}\nbase_model_relation: {relation}\n",
        title=(told.name or directory.name) if local else f"{config.path} with {method}",
        what=f"LoRA adapters for a {what}," if lora else f"A {what},",
        method=method,
        source=told.objective.arxiv,
        needs=" and peft" if lora else "",
        imports=imports,
        load=load,
        prompt=told.prompt,
        arguments="\n".join(
            f"    {name}={value!r}," for name, value in policy.call_arguments(rollout).items()
        ),
        notes="\n\n".join(_notes(policy, directory.name, lora=lora)),
        facts="".join(
            f"| {name} | {value} |\n" for name, value in {**_facts(policy, lora=lora), **told.facts}.items()
        ),
        sections=told.sections,
    )
    (directory / "README.md").write_text(text)


def base_place(config: ModelConfig) -> str:
    """Where the base model is: its hub id, or the whole path of its directory."""
    return str(find(config.path).resolve()) if _is_local(config) else config.path


def published(told: Any) -> Any:
    """A setting as a card has it: of a path of this machine its last name.

    >>> published({"path": "/home/me/signs.txt", "limit": 3})
    {'path': 'path/to/signs.txt', 'limit': 3}
    """
    if isinstance(told, dict):
        return {name: published(value) for name, value in told.items()}
    if isinstance(told, list):
        return [published(value) for value in told]
    return _to_fill_in(told) if isinstance(told, str) and Path(told).is_absolute() else told


def loading_base(policy: PipelinePolicy) -> str:
    """Python that loads the stock pipeline that adapters were trained on."""
    config = policy.config
    if not _is_local(config):
        return loading(policy, quoted(config.path), revision=config.revision)
    place = quoted(_to_fill_in(base_place(config)))
    return f"base = {place}  # where you have it\n{loading(policy, 'base', revision=None)}"


def loading(policy: PipelinePolicy, place: str, *, revision: str | None) -> str:
    """Python that loads a stock pipeline with the parts and the dtype of the policy's.

    Args:
        place: Python too.
    """
    arguments = [place]
    if revision is not None:
        arguments.append(f"revision={quoted(revision)}")
    arguments.append(f"dtype=torch.{policy.config.dtype}")
    # Left out, stock pipelines miss them.
    arguments += [f"{name}=None" for name in _absent(policy)]
    return assigned("pipeline", f"{type(policy.pipeline).__name__}.from_pretrained", arguments)


def quoted(text: str) -> str:
    """As a string of Python, whatever is in it."""
    return json.dumps(text, ensure_ascii=False)


def assigned(name: str, function: str, arguments: Sequence[str]) -> str:
    """Python that calls a function, on one line if it fits."""
    line = f"{name} = {function}({', '.join(arguments)})"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name} = {function}(", *(f"    {argument}," for argument in arguments), ")"])


def _absent(policy: PipelinePolicy) -> list[str]:
    """Optional parts that the base model has not; the policy may have been loaded without those it has."""
    if not policy.parts.optional:
        return []
    index = type(policy.pipeline).load_config(base_place(policy.config), revision=policy.config.revision)
    return [name for name in sorted(policy.parts.optional) if (index.get(name) or [None])[0] is None]


def _notes(policy: PipelinePolicy, folder: str, *, lora: bool) -> list[str]:
    config, absent = policy.config, _absent(policy)
    notes = [
        f"`{quoted(folder)}` is the folder of this file, seen from the one that it lies in. "
        '`pipeline.to("cuda")` moves the pipeline to a GPU.'
    ]
    if lora and _is_local(config):
        notes.append(
            f"The base model was a local folder, `{_folder(config)}`: give `base` its place on your machine. "
            "With another model of its kind it runs too, but its images are not those that were trained."
        )
    if config.dtype == "bfloat16":
        notes.append(BFLOAT16_NOTE)
    if absent:
        names = " and ".join(f"`{name}`" for name in absent)
        notes.append(f"The base model has no {names}: they are passed as None.")
    return notes


def _facts(policy: PipelinePolicy, *, lora: bool) -> dict[str, object]:
    config, denoiser = policy.config, type(policy.transformer).__name__
    if config.train == "full":
        trained = f"every weight of the {denoiser}"
    else:
        targets = ", ".join(f"`{target}`" for target in config.lora.targets or policy.lora_targets)
        merged = "" if lora else ", merged here"
        trained = (
            f"LoRA of rank {config.lora.rank} and alpha {config.lora.alpha:g}{merged}, in the {denoiser}: "
            f"{targets}"
        )
    facts: dict[str, object] = {"base model": _base(config)}
    if lora:
        digest = base_digest(policy.transformer.state_dict())
        facts["weights of the base model"] = f"digest `{digest}`; `dgpo eval` refuses others"
    return facts | {
        "trained": trained,
        "precision": "float32"
        if config.dtype == "float32"
        else f"trained weights in float32, all others and sampling in {config.dtype}",
    }


def _base(config: ModelConfig) -> str:
    if _is_local(config):
        return f"`{_folder(config)}`, a local folder"
    place = f"https://huggingface.co/{config.path}"
    if config.revision is None:
        return f"[{config.path}]({place}), no revision pinned"
    return f"[{config.path}]({place}/tree/{config.revision}), revision `{config.revision}`"


def _folder(config: ModelConfig) -> str:
    return Path(base_place(config)).name


def _to_fill_in(path: str) -> str:
    return f"path/to/{Path(path).name}"


def _is_local(config: ModelConfig) -> bool:
    return find(config.path).exists() or config.path.count("/") != 1
