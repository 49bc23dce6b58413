"""Images that a run keeps for its reader, in `samples/`: written and read here, so that both sides agree.

Layout
- `samples/step-000120/group-000960.png`: the G images of a group in one row, no margins, and beside it a
  `.json` (GroupSample).
- `samples/eval-before.png`, `samples/eval-after.png`: held-out images at the same seeds, row by row, eight
  a row, no margins, and beside each a `.json`: a list of {prompt, scores, details}.

Promises
- The JSON is written last and through a rename: where it is, its picture is whole.
- Reading an absent, torn or foreign file gives nothing, never an exception: a report must always be possible.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

log = logging.getLogger(__name__)

EVAL_COLUMNS = 8
MAX_PIXELS = 64_000_000

Images = NDArray[np.uint8]
"""(N, H, W, 3), RGB."""


class Sample(BaseModel):
    """What is told about samples; unknown keys are left alone, so that a newer run can be read."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class GroupSample(Sample):
    """One group that was trained; lists have one entry a sample, in the order of the images."""

    ordinal: int
    prompt: str
    version: str
    """Policy version that sampled it, `epoch.step`."""
    staleness: int
    rewards: dict[str, list[float]]
    total: list[float]
    """Weighted combination that was trained on."""
    advantages: list[float]
    details: dict[str, list[dict[str, Any]]] = {}
    """Reward name -> what the scorer said: `text`, `exact`."""

    @model_validator(mode="after")
    def _whole(self) -> GroupSample:
        lengths = {
            "advantages": len(self.advantages),
            **{name: len(scores) for name, scores in self.rewards.items()},
            **{name: len(said) for name, said in self.details.items()},
        }
        for name, length in lengths.items():
            if length != len(self.total):
                raise ValueError(f"{name} has {length} entries for {len(self.total)} samples")
        return self


class EvalSample(Sample):
    """One held-out image."""

    prompt: str
    scores: dict[str, float] = {}
    details: dict[str, dict[str, Any]] = {}


_EVAL: TypeAdapter[list[EvalSample]] = TypeAdapter(list[EvalSample])


def save_group(run_dir: Path, step: int, group: GroupSample, images: Images) -> Path:
    """Keep a trained group; `step` is the update that consumed it.

    Args:
        images: (G, H, W, 3) in the order of the group's lists.

    Returns:
        The path of the PNG.
    """
    if len(images) != len(group.total):
        raise ValueError(f"group {group.ordinal}: {len(images)} images for {len(group.total)} samples")
    path = run_dir / "samples" / f"step-{step:06d}" / f"group-{group.ordinal:06d}.png"
    _save(path, np.concatenate(list(images), axis=1), group.model_dump(mode="json"))
    return path


def save_eval(
    run_dir: Path, when: Literal["before", "after"], samples: Sequence[EvalSample], images: Images
) -> Path:
    """Keep held-out images, the same prompts and seeds in the same order before and after.

    Args:
        images: (N, H, W, 3), one a sample.
    """
    if len(images) != len(samples) or not samples:
        raise ValueError(f"eval-{when}: {len(images)} images for {len(samples)} samples")
    count, height, width, _ = images.shape
    columns = min(EVAL_COLUMNS, count)
    rows = math.ceil(count / columns)
    grid = np.zeros((rows * columns, height, width, 3), dtype=np.uint8)
    grid[:count] = images
    sheet = grid.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    path = run_dir / "samples" / f"eval-{when}.png"
    _save(
        path, sheet.reshape(rows * height, columns * width, 3), _EVAL.dump_python(list(samples), mode="json")
    )
    return path


def load_eval(run_dir: Path, when: Literal["before", "after"]) -> list[tuple[EvalSample, Image.Image]]:
    """The samples of `save_eval` with their images; empty where they are missing or unreadable."""
    path = run_dir / "samples" / f"eval-{when}.json"
    try:
        samples = _EVAL.validate_json(path.read_bytes())
        columns = min(EVAL_COLUMNS, len(samples))
        tiles = (
            _tiles(path.with_suffix(".png"), columns, math.ceil(len(samples) / columns)) if samples else []
        )
    except FileNotFoundError:
        return []
    except (OSError, ValueError, ValidationError) as error:
        log.warning("%s: left out: %s", path, error)
        return []
    return list(zip(samples, tiles, strict=False))


def list_groups(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, path of the JSON) of every kept group, in the order of steps and ordinals."""
    found = []
    for path in (run_dir / "samples").glob("step-*/group-*.json"):
        step = path.parent.name.removeprefix("step-")
        if step.isdigit():
            found.append((int(step), path))
    return sorted(found)


def load_group(path: Path) -> tuple[GroupSample, list[Image.Image]] | None:
    """A group of `list_groups` with its G images; None where it cannot be read."""
    try:
        group = GroupSample.model_validate_json(path.read_bytes())
        return group, _tiles(path.with_suffix(".png"), len(group.total), 1)
    except (OSError, ValueError, ValidationError) as error:
        log.warning("%s: left out: %s", path, error)
        return None


def _tiles(path: Path, columns: int, rows: int) -> list[Image.Image]:
    with Image.open(path, formats=("PNG",)) as sheet:
        if sheet.width * sheet.height > MAX_PIXELS:
            raise ValueError(f"{sheet.width} x {sheet.height} pixels, at most {MAX_PIXELS} are read")
        if columns < 1 or sheet.width % columns or sheet.height % rows:
            raise ValueError(f"{sheet.width} x {sheet.height} does not divide into {columns} x {rows} images")
        width, height = sheet.width // columns, sheet.height // rows
        picture = sheet.convert("RGB")
    return [
        picture.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))
        for y in range(rows)
        for x in range(columns)
    ]


def _save(path: Path, picture: Images, told: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, format="PNG")
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(told, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    os.replace(unfinished, path.with_suffix(".json"))  # noqa: PTH105
