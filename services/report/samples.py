"""The images a run kept in `samples/`, read for the report.

Layout (written by rollout_workers/, with services/images.py)
- `samples/step-000120/group-000960.png`: the G images of a group in one row, no margins, and beside it a
  `.json` (GroupSample).
- `samples/eval-before.png`, `samples/eval-after.png`: held-out images at the same seeds, row by row, no
  margins, and beside each a `.json`: a list of {prompt, scores, details}, which may be longer than the grid.

Promises
- Reading an absent, torn or foreign file gives nothing, never an exception: a report must always be possible.
- Pictures are decoded as PNG only, and under a limit on their pixels.
"""

from __future__ import annotations

import base64
import io
import logging
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, TypeAdapter, model_validator

log = logging.getLogger(__name__)

MAX_PIXELS = 64_000_000
EXACT_SIDE = 128
SHOWN_SIDE = 320
"""Larger images are shown at most this large, pixels on the longer side."""


class Sample(BaseModel):
    """What is told about samples; unknown keys are left alone, so that a newer run can be read."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True)


class GroupSample(Sample):
    """One group; lists have one entry a sample, in the order of the images."""

    ordinal: int
    prompt: str
    version: str
    """Policy version that sampled it, `epoch.step`."""
    rewards: dict[str, list[float]]
    details: dict[str, list[dict[str, Any]]] = {}
    """Reward name -> what the scorer said: `text`, `exact`."""

    @property
    def size(self) -> int:
        return len(next(iter(self.rewards.values())))

    @model_validator(mode="after")
    def _whole(self) -> GroupSample:
        if not self.rewards:
            raise ValueError("a group without rewards")
        lengths = {
            **{name: len(scores) for name, scores in self.rewards.items()},
            **{name: len(said) for name, said in self.details.items() if said},
        }
        for name, length in lengths.items():
            if length != self.size:
                raise ValueError(f"{name} has {length} entries for {self.size} samples")
        return self


class EvalSample(Sample):
    """One held-out image."""

    prompt: str
    scores: dict[str, float] = {}
    details: dict[str, dict[str, Any]] = {}


_EVAL: TypeAdapter[list[EvalSample]] = TypeAdapter(list[EvalSample])


def load_eval(run_dir: Path, when: str) -> list[EvalSample]:
    """What was scored before or after training; empty where it is missing or unreadable."""
    path = run_dir / "samples" / f"eval-{when}.json"
    try:
        return _EVAL.validate_json(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        log.warning("%s: left out: %s", path, error)
        return []


def load_eval_images(run_dir: Path, when: str, width: int, height: int) -> list[Image.Image]:
    """The grid of `eval-<when>.png` cut into images of this size; its last row may be padded."""
    path = run_dir / "samples" / f"eval-{when}.png"
    try:
        return _tiles(path, lambda sheet: (sheet.width // width, sheet.height // height))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        log.warning("%s: left out: %s", path, error)
        return []


def list_groups(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, path of the JSON) of every kept group, in the order of steps and ordinals."""
    return sorted(
        (step, path)
        for folder in (run_dir / "samples").glob("step-*")
        if (step := step_of(folder)) is not None
        for path in groups_in(folder)
    )


def step_of(folder: Path) -> int | None:
    """The step of a folder of samples/; None where it is another one."""
    step = folder.name.removeprefix("step-")
    return int(step) if step.isdecimal() else None


def groups_in(folder: Path) -> list[Path]:
    """The JSON of each group in the folder of a step, in the order of ordinals."""
    return sorted(folder.glob("group-*.json"))


def load_group(path: Path) -> tuple[GroupSample, list[Image.Image]] | None:
    """A group of `list_groups` with its G images; None where it cannot be read."""
    group = read_group(path)
    images = load_group_images(path, group.size) if group else None
    return (group, images) if group and images else None


def read_group(path: Path) -> GroupSample | None:
    """What is told about a group, without its images; None where it cannot be read."""
    try:
        return GroupSample.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        log.warning("%s: left out: %s", path, error)
        return None


def load_group_images(path: Path, count: int) -> list[Image.Image] | None:
    """The images of the group whose JSON this is; None where they cannot be read."""
    picture = path.with_suffix(".png")
    try:
        return _tiles(picture, lambda _: (count, 1))
    except (OSError, ValueError) as error:
        log.warning("%s: left out: %s", picture, error)
        return None


def data_uri(image: Image.Image) -> str:
    """An image that lives inside the page."""
    kind, data = encoded(image)
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def encoded(image: Image.Image) -> tuple[str, bytes]:
    """Media type and file of an image: a tiny one exactly (PNG), others small enough to mail (WebP)."""
    out = io.BytesIO()
    if max(image.size) <= EXACT_SIDE:
        image.save(out, format="PNG", optimize=True)
        return "image/png", out.getvalue()
    shown = image.copy()
    shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    shown.save(out, format="WEBP", quality=85)
    return "image/webp", out.getvalue()


def _tiles(path: Path, shape: Any) -> list[Image.Image]:
    with Image.open(path, formats=("PNG",)) as sheet:
        if sheet.width * sheet.height > MAX_PIXELS:
            raise ValueError(f"{sheet.width} x {sheet.height} pixels, at most {MAX_PIXELS} are read")
        columns, rows = shape(sheet)
        if columns < 1 or rows < 1 or sheet.width % columns or sheet.height % rows:
            raise ValueError(f"{sheet.width} x {sheet.height} does not divide into {columns} x {rows} images")
        width, height = sheet.width // columns, sheet.height // rows
        picture = sheet.convert("RGB")
    return [
        picture.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))
        for y in range(rows)
        for x in range(columns)
    ]
