"""The model card of an export: how the model came about, and how to call it with stock diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from policy.pipeline_policy import PipelinePolicy
from services.config import AnyObjective, DgpoConfig, RolloutConfig

CARD = """---
library_name: diffusers
tags:
- text-to-image
- {tag}
{base_model}---

# {title}

{what} post-trained with {method}
([arXiv {source}](https://arxiv.org/abs/{source})) by dgpo-cluster.

{facts}
## Use

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
"""


@dataclass(frozen=True)
class Training:
    """How a model came about."""

    objective: type[AnyObjective] = DgpoConfig
    name: str = ""
    """Of the run."""
    prompt: str = "a photo of a red bicycle"
    """An example."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """Lines of the card (run, step, scores)."""


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
    local = Path(config.path).exists() or config.path.count("/") != 1
    what = "LoRA adapters" if directory.name == "lora" else "A text-to-image pipeline"
    method = told.objective.method
    text = CARD.format(
        tag=re.sub(r"[^a-z0-9]+", "-", method.lower()),
        base_model="" if local else f"base_model: {config.path}\n",
        title=(told.name or directory.name) if local else f"{config.path} with {method}",
        what=f"{what} (trained: {config.train}, base: {Path(config.path).name})",
        method=method,
        source=told.objective.arxiv,
        facts="".join(f"- {name}: {value}\n" for name, value in told.facts.items()),
        imports=imports,
        load=load,
        prompt=told.prompt,
        arguments="\n".join(
            f"    {name}={value!r}," for name, value in policy.call_arguments(rollout).items()
        ),
    )
    (directory / "README.md").write_text(text)
