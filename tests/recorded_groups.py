"""Small groups and recordings of them, for the tests of recording and offline training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from services.codec import Group
from services.config import Config
from services.config_file import load_config
from services.messages import GroupHeader, PolicyVersion, Prompt
from services.recording_writer import RecordingWriter

RUN = "recorded-run"
SIZE = 4
SHAPE = (4, 8, 16)
"""Of the quickstart's latents."""


def config(*overrides: str) -> Config:
    """The quickstart with groups of four, one reward, two groups an update."""
    return load_config(
        "quickstart",
        [
            f"rollout.group_size={SIZE}",
            "learner.groups_per_step=2",
            "learner.micro_batch=4",
            "rewards=[{name: ocr, app: ocr}]",
            *overrides,
        ],
    )


def group(ordinal: int, *, run: str = RUN, **changes: Any) -> Group:
    """A group whose tensors follow from its ordinal."""
    generator = torch.Generator().manual_seed(ordinal)
    header = GroupHeader(
        run=run,
        ordinal=ordinal,
        attempt=1,
        version=PolicyVersion(epoch=0, step=ordinal // 2),
        prompt=Prompt(text=f"prompt {ordinal}"),
        seeds=tuple(range(10 * ordinal, 10 * ordinal + SIZE)),
        rewards={"ocr": tuple(torch.rand(SIZE, generator=generator).tolist())},
        worker="rollout-0",
        sample_s=1.0,
        reward_s=1.0,
    ).model_copy(update=changes)
    tensors = {
        "latents": torch.randn((SIZE, *SHAPE), generator=generator),
        "condition.text": torch.randn((3, 5), generator=generator).to(torch.bfloat16),
    }
    return Group(header, tensors)


def record(directory: Path, groups: Sequence[Group], made_by: Config | None = None) -> Path:
    """A recording of these, two an update."""
    with RecordingWriter(directory, made_by or config(), RUN) as writer:
        for first in range(0, len(groups), 2):
            writer.append(groups[first : first + 2])
    return directory
