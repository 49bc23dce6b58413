"""Run directories for tests of the run page: made up, small or long."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from services.config_file import load_config
from services.images import write_strip
from services.metrics import AnyRow, EvalRow, UpdateRow
from services.run_directory import RunDirectory
from services.telemetry import METRICS_FILE

HOSTILE = '<script>document.title = "owned"</script><img src=x onerror="document.title=1">'
TOKEN = "a-token-for-tests-only"


def a_run(folder: Path, *overrides: str) -> RunDirectory:
    return RunDirectory.create(load_config("quickstart", [f"run.directory={folder}", *overrides]))


def update(step: int, *, epoch: int = 0, reward: float = 0.5, last: int = 40) -> UpdateRow:
    return UpdateRow.model_validate(
        {
            "time": 1000.0 + 5 * step,
            "epoch": epoch,
            "step": step,
            "max_steps": last,
            "seconds": 5.0,
            "reward_mean": reward,
            "reward_std": 0.1,
            "rewards": {"ocr": {"mean": reward}, "tesseract": {"mean": reward - 0.1}},
            "staleness_max": 1,
            "groups": 8 * step,
            "images": 128 * step,
            "loss": 0.01,
            "phases": {"wait_s": 1.0, "forward_backward_s": 3.0},
        }
    )


def evaluation(step: int, when: str = "during", *, epoch: int = 0, score: float = 0.5) -> EvalRow:
    rewards = {"ocr": {"mean": score, "se": 0.01}}
    row = {"time": 1000.0 + step, "when": when, "epoch": epoch, "step": step, "prompts": 64}
    return EvalRow.model_validate({**row, "rewards": rewards})


def append(run: RunDirectory, rows: Iterable[AnyRow]) -> None:
    with (run.root / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.writelines(row.model_dump_json() + "\n" for row in rows)


def keep_group(
    run: RunDirectory, step: int, ordinal: int, scores: Sequence[float], prompt: str = "a sign"
) -> Path:
    place = run.samples / f"step-{step:06d}"
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"group-{ordinal:06d}.json"
    pixels = np.random.default_rng(ordinal).integers(0, 255, (len(scores), 32, 64, 3), dtype=np.uint8)
    write_strip(pixels, path.with_suffix(".png"))
    record = {
        "ordinal": ordinal,
        "prompt": prompt,
        "version": f"0.{step}",
        "rewards": {"ocr": list(scores), "tesseract": [0.5] * len(scores)},
        "details": {"ocr": [{"text": f"K{i}"} for i in range(len(scores))]},
    }
    path.write_text(json.dumps(record))
    return path


def long_run(folder: Path, *, updates: int, groups: int) -> RunDirectory:
    """Many rows and groups in little time: their text differs in the step alone."""
    run = a_run(folder)
    row = update(1, last=updates).model_dump_json()
    before, after = row.split('"step":1,', 1)
    with (run.root / METRICS_FILE).open("w", encoding="utf-8") as file:
        file.writelines(f'{before}"step":{step},{after}\n' for step in range(1, updates + 1))
    record = {"prompt": "a sign", "version": "0.1", "rewards": {"ocr": [0.2, 0.8], "tesseract": [0.5, 0.5]}}
    for number in range(groups):
        place = run.samples / f"step-{number:06d}"
        place.mkdir()
        (place / f"group-{number:06d}.json").write_text(json.dumps({"ordinal": number, **record}))
    return run
