"""Comparisons of training runs: what is read from a run, and when a ratio may be told."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from benchmarks import comparison
from benchmarks.comparison import run_comparison
from benchmarks.comparison_table import compare, markdown
from benchmarks.comparisons import COMPARISONS, Comparison, Entry
from benchmarks.curves import curve
from benchmarks.plots import draw
from services.config import Config
from services.config_file import dump_config, load_config


def write_run(directory: Path, scores: dict[int, float], *, step_s: float = 2.0) -> Path:
    """A finished run with an update every `step_s` seconds, the first of which waited 10 s longer."""
    directory.mkdir(parents=True)
    last = max(scores)
    rows: list[dict[str, object]] = []
    for step, score in scores.items():
        when = "before" if step == 0 else "after" if step == last else "during"
        diversity = {"text_across": 10.0 - step, "text_within": 1.0}
        estimate = {"ocr": {"mean": score, "se": 0.01}}
        rows.append(
            {"kind": "eval", "time": 0.0, "when": when, "epoch": 0, "step": step, "prompts": 8}
            | {"rewards": estimate, "exact": estimate, "diversity": diversity}
        )
    for step in range(1, last + 1):
        row = {"kind": "update", "epoch": 0, "step": step, "max_steps": last, "images": 128 * step}
        seconds = step_s + (10 if step == 1 else 0)
        rows.append(
            row
            | {"time": 1000 + 10 + step * step_s, "seconds": seconds, "reward_mean": 0.5, "reward_std": 0.1}
        )
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def configured(run: Path, seed: int, *overrides: str) -> None:
    """As a comparison of the quickstart would have configured it."""
    settings = [*comparison._EVALUATED, comparison._ALONE, *overrides, f"run.seed={seed}"]
    config = load_config("quickstart", [*settings, f"run.directory={run.parent.resolve()}"])
    (run / "config.yaml").write_text(dump_config(config))


def test_only_a_finished_run_of_the_same_configuration_is_taken(tmp_path: Path) -> None:
    config = load_config("quickstart", [f"run.directory={tmp_path.resolve()}"])
    assert comparison._finished(tmp_path, config) is None
    run = write_run(tmp_path / "a", {0: 0.4, 2: 0.95})
    (run / "config.yaml").write_text(dump_config(config))
    assert comparison._finished(tmp_path, config) == run
    moved = load_config("quickstart", ["run.directory=elsewhere"])
    assert comparison._finished(tmp_path, moved) == run
    other = load_config("quickstart", [f"run.directory={tmp_path.resolve()}", "learner.max_steps=8"])
    assert comparison._finished(tmp_path, other) is None
    unfinished = run / "metrics.jsonl"
    unfinished.write_text("".join(unfinished.read_text().splitlines(keepends=True)[:1]))
    assert comparison._finished(tmp_path, config) is None


def test_a_moved_folder_is_taken_with_what_lies_in_it(tmp_path: Path) -> None:
    def at(root: str, model: str) -> Config:
        place = f"{root}/ablations/offline/seed-0"
        settings = [f"run.directory={place}", f"prompts.path={place}/recording"]
        return load_config("offline", [*settings, f"model.path={root}/ablations/models/{model}"])

    run = write_run(tmp_path / "run", {0: 0.4, 2: 0.95})
    (run / "config.yaml").write_text(dump_config(at("/first", "one")))
    assert comparison._finished(tmp_path, at("/second/place", "one")) == run
    assert comparison._finished(tmp_path, at("/second/place", "other")) is None


def test_a_curve_counts_from_the_start_of_the_loop(tmp_path: Path) -> None:
    found = curve(write_run(tmp_path / "run", {0: 0.4, 2: 0.8, 4: 0.9}))
    assert found.steps == [0, 2, 4]
    assert found.seconds == [0.0, 14.0, 18.0]
    assert found.images == [0, 256, 512]
    assert found.scores == found.exact == [0.4, 0.8, 0.9]
    assert found.diversity == pytest.approx(0.6)
    assert found.reached(0.85) == pytest.approx((16.0, 384.0))
    assert found.reached(0.95) is None


def test_ratios_are_told_where_every_seed_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPARISONS, "two", Comparison((Entry("fast"), Entry("slow"))))
    place = tmp_path / "two"
    for seed in range(2):
        configured(write_run(place / "fast" / f"seed-{seed}" / "run", {0: 0.4, 2: 0.95}), seed)
        slow = {0: 0.4, 2: 0.6, 8: 0.88 if seed else 0.95}
        configured(write_run(place / "slow" / f"seed-{seed}" / "run", slow), seed)
    screen = io.StringIO()
    result = run_comparison("two", seeds=2, runs=tmp_path, screen=Console(file=screen, width=80))
    fast, slow_row = result["entries"]
    assert fast["to_0.85"]["ratio_seconds"] == 1.0
    assert slow_row["to_0.85"]["ratio_images"] > 2
    # One seed never came to 0.9: a mean over the others would flatter.
    assert slow_row["to_0.9"] | {"seconds": None, "images": None} == {
        "reached": 1,
        "seconds": None,
        "images": None,
        "ratio_seconds": None,
        "ratio_images": None,
    }
    assert slow_row["final"]["mean"] == pytest.approx(0.915)
    assert "1 of 2" in screen.getvalue()
    assert "to 0.93 " in screen.getvalue(), "all columns are there at a width of 80"
    assert "…" not in screen.getvalue()
    page = Path(result["page"]).read_text()
    assert "| slow | 0.915 ± 0.035 |" in page
    assert "1 of 2 seeds" in page
    for against in ("seconds", "images"):
        assert ElementTree.parse(result[f"plot_{against}"]).getroot().tag.endswith("svg")


def test_diversity_that_is_not_known_is_not_told(tmp_path: Path) -> None:
    known = curve(write_run(tmp_path / "run", {0: 0.4, 2: 0.95}))
    unknown = replace(known, diversity=math.nan)
    for runs in ([unknown], [known, unknown]):
        rows = compare({"one": runs}, {"one": "one"})
        assert rows[0]["diversity"] is None
        assert "nan" not in markdown(rows, len(runs))


def test_a_ratio_is_told_to_the_entry_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = (Entry("first"), Entry("fast"), Entry("slow", against="fast"))
    monkeypatch.setitem(COMPARISONS, "pairs", Comparison(entries))
    for name, step_s in (("first", 1.0), ("fast", 2.0), ("slow", 6.0)):
        place = tmp_path / "pairs" / name / "seed-0" / "run"
        configured(write_run(place, {0: 0.4, 20: 0.95}, step_s=step_s), 0)
    result = run_comparison("pairs", seeds=1, runs=tmp_path, screen=Console(file=io.StringIO()))
    first, fast, slow = (row["to_0.9"]["ratio_seconds"] for row in result["entries"])
    assert (first, fast, slow) == pytest.approx((1.0, 50 / 30, 130 / 50))


def test_the_same_curves_draw_the_same_picture(tmp_path: Path) -> None:
    curves = {"a": [curve(write_run(tmp_path / "run", {0: 0.4, 2: 0.8}))]}
    first = draw(curves, "seconds", tmp_path / "one.svg").read_bytes()
    assert draw(curves, "seconds", tmp_path / "two.svg").read_bytes() == first


def test_a_run_that_fails_is_named_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        COMPARISONS, "one", Comparison((Entry("broken", overrides=("prompts.source=file",)),))
    )
    with pytest.raises(ValueError, match="needs a path"):
        run_comparison("one", seeds=1, runs=tmp_path, screen=Console(file=io.StringIO()))
    absent = ("prompts.source=file", "prompts.path=/nowhere.txt")
    monkeypatch.setitem(COMPARISONS, "one", Comparison((Entry("broken", overrides=absent),)))
    with pytest.raises(RuntimeError, match=r"broken, seed 0: exit code \d+; see .*output.log"):
        run_comparison("one", seeds=1, runs=tmp_path, screen=Console(file=io.StringIO()))


@pytest.mark.parametrize("name", sorted(COMPARISONS))
def test_every_entry_can_be_configured(name: str) -> None:
    names = [entry.name for entry in COMPARISONS[name].entries]
    assert len(set(names)) == len(names)
    assert {entry.against for entry in COMPARISONS[name].entries} <= {None, *names}
    for entry in COMPARISONS[name].entries:
        settings = [*comparison._EVALUATED, comparison._ALONE, *entry.overrides]
        assert load_config(entry.recipe, settings).evaluation_rollout.solver == "dpmsolver++"
