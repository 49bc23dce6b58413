"""report.html: complete, offline, escaped, and possible however little a run has left behind."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from services.config_file import dump_config, load_config
from services.images import write_grid, write_strip
from services.metrics import AnyRow, Estimate, EvalRow, MemoryRow, Spread, UpdateRow
from services.report import build_report
from services.report.axes import nice_ticks
from services.report.charts import Series, line_chart, points
from services.report.samples import GroupSample, data_uri, load_eval_images, load_group
from services.report.scores import engines
from services.telemetry import Telemetry

HEIGHT, WIDTH, GROUP = 32, 64, 16
HOSTILE = '<script>alert("x")</script>'


def images(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 255, (count, HEIGHT, WIDTH, 3), dtype=np.uint8)


def update(step: int, *, epoch: int = 0, last: int = 40) -> UpdateRow:
    reward = 0.9 - 0.4 * math.exp(-step / 12)
    return UpdateRow(
        time=1000.0 + 5 * step,
        epoch=epoch,
        step=step,
        max_steps=last,
        seconds=5.0,
        reward_mean=reward,
        reward_std=0.12,
        rewards={"ocr": Spread(mean=reward, std=0.12), "tesseract": Spread(mean=reward - 0.1)},
        staleness_mean=0.9,
        staleness_max=1,
        queue_depth=4,
        groups=8 * step,
        images=8 * step * GROUP,
        groups_per_s=1.6,
        loss=0.01 / step,
        dsm=0.4,
        grad_norm=1.0,
        group_weight=0.5,
        phases={"wait_s": 1.0, "forward_backward_s": 3.5, "publish_s": 0.1, "commit_s": 0.05},
        rollout={"sample_s": 0.8, "reward_s": 0.4},
    )


def evaluation(step: int, when: str, score: float, prompts: int = 320) -> EvalRow:
    estimates = {"ocr": Estimate(mean=score, se=0.012), "tesseract": Estimate(mean=score - 0.05, se=0.014)}
    row = {
        "time": 1000.0 + step,
        "when": when,
        "epoch": 0,
        "step": step,
        "prompts": prompts,
        "rewards": estimates,
    }
    exact = {name: Estimate(mean=score**3, se=0.02) for name in estimates}
    return EvalRow.model_validate(
        {**row, "exact": exact, "diversity": {"background_within": 30.0 * score, "placement_across": 0.0}}
    )


def write_eval(run: Path, when: str, score: float, prompts: list[str]) -> None:
    write_grid(images(len(prompts)), run / "samples" / f"eval-{when}.png", columns=8)
    said = {"text": HOSTILE, "exact": score > 0.5}
    records = [{"prompt": p, "scores": {"ocr": score}, "details": {"ocr": said}} for p in prompts]
    (run / "samples" / f"eval-{when}.json").write_text(json.dumps(records))


def write_group(run: Path, step: int, ordinal: int, scores: list[float], prompt: str = "a sign") -> Path:
    place = run / "samples" / f"step-{step:06d}"
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"group-{ordinal:06d}.json"
    write_strip(images(len(scores), ordinal), path.with_suffix(".png"))
    record = {
        "ordinal": ordinal,
        "prompt": prompt,
        "version": f"0.{step}",
        "rewards": {"ocr": scores, "tesseract": [0.5] * len(scores)},
        "details": {"ocr": [{"text": f"K7Q{i}", "exact": False} for i in range(len(scores))]},
    }
    path.write_text(json.dumps(record))
    return path


def write_rows(run: Path, rows: list[AnyRow]) -> None:
    with Telemetry(run, tensorboard=False) as telemetry:
        for row in rows:
            telemetry.write(row)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run, with everything in it."""
    run = tmp_path / "quickstart-20261122-120000-ab12"
    (run / "samples").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(load_config("quickstart")))
    (run / "environment.json").write_text(
        json.dumps({"git": "abc123", "cpus": 2, "packages": {"torch": "2.13.0"}})
    )
    rows: list[AnyRow] = [evaluation(0, "before", 0.5), *(update(step) for step in range(1, 41))]
    write_rows(run, [*rows, evaluation(20, "during", 0.8, 64), evaluation(40, "after", 0.94), memory_row()])
    with Telemetry(run, tensorboard=False) as telemetry:
        telemetry.event("dead letter", f"reward ocr: {HOSTILE}", level="warning", ordinal=77)
    prompts = [f'a sign that says "{HOSTILE}{i}"' for i in range(10)]
    write_eval(run, "before", 0.5, prompts)
    write_eval(run, "after", 0.94, prompts)
    for step in (0, 20):
        write_group(run, step, step * 8, [i / GROUP for i in range(GROUP)], prompt=HOSTILE)
    return run


def memory_row() -> MemoryRow:
    return MemoryRow(time=2000.0, parts={"learner-0": 612_000_000, "rollout-0": 580_000_000})


def read(run: Path) -> str:
    return build_report(run).read_text(encoding="utf-8")


def test_the_report_tells_the_whole_run(run_dir: Path) -> None:
    text = read(run_dir)
    for said in (
        "Done: 40 of 40 updates",
        "0.500",
        "0.940",
        "± 0.012",
        "held out, never trained on",
        "+0.440",
        "Staleness of the groups",
        "forward and backward",
        "612.0 MB",
        "dead letter",
        "abc123",
        "beta: 500",
        "placement",
    ):
        assert said in text, said
    assert text.count('class="pair"') == 10
    assert text.count('class="group"') == 2


def test_what_a_curriculum_leaves_out_is_drawn_where_there_is_one(run_dir: Path) -> None:
    title = "Prompts left out by the curriculum"
    write_rows(run_dir, [update(41).model_copy(update={"prompts_left_out": 17})])
    assert title not in read(run_dir)
    (run_dir / "config.yaml").write_text(
        dump_config(load_config("quickstart", ["prompts.curriculum.after=3"]))
    )
    figure = read(run_dir).partition(title)[2].partition("</figure>")[0]
    assert "<svg" in figure and ">20<" in figure


def test_it_opens_offline_and_is_well_formed(run_dir: Path) -> None:
    text = read(run_dir)
    assert not re.search(r"""(?:src|href)\s*=\s*(?!"data:)""", text), "nothing may be loaded"
    assert "url(" not in text
    assert "@import" not in text
    parser = _Balanced()
    parser.feed(text)
    assert parser.open == []


def test_what_comes_from_prompts_and_scorers_is_escaped(run_dir: Path) -> None:
    text = read(run_dir)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 10


def test_best_and_worst_come_first_and_last(run_dir: Path) -> None:
    text = read(run_dir)
    group = text[text.index('class="group"') :]
    group = group[: group.index("</article>")]
    members = re.findall(
        r'class="member( best| worst)?">.*?<b>([\d.]+)</b><span class="\w*">([^<]+)<', group, re.S
    )
    assert len(members) == GROUP
    assert [kind.strip() for kind, _, _ in members] == ["best", *[""] * (GROUP - 2), "worst"]
    totals = [float(total) for _, total, _ in members]
    assert totals == sorted(totals, reverse=True)
    assert members[0][2] == "+1.63"
    assert members[-1][2] == "−1.63"


def test_an_all_equal_group_has_neither_best_nor_worst(run_dir: Path) -> None:
    write_group(run_dir, 30, 240, [0.5] * GROUP)
    text = read(run_dir)
    assert text.count('class="tag"') == 4
    assert "all equal: teaches nothing" in text


def test_a_paired_change_has_the_smaller_error() -> None:
    from services.report.samples import EvalSample

    before = [EvalSample(prompt=str(i), scores={"ocr": i / 10}) for i in range(10)]
    after = [EvalSample(prompt=str(i), scores={"ocr": i / 10 + 0.1}) for i in range(10)]
    rows = evaluation(0, "before", 0.5), evaluation(40, "after", 0.6)
    paired = engines(None, *rows, (before, after))[0].changes[0]
    assert paired.difference == pytest.approx(0.1)
    assert paired.error == pytest.approx(0.0, abs=1e-12)
    unpaired = engines(None, *rows, (before, after[:5]))[0].changes[0]
    assert unpaired.error == pytest.approx(math.hypot(0.012, 0.012))


@pytest.mark.parametrize("what", ["config.yaml", "metrics.jsonl", "environment.json", "samples"])
def test_a_missing_piece_is_no_error(run_dir: Path, what: str) -> None:
    path = run_dir / what
    if path.is_dir():
        path.rename(run_dir / "elsewhere")
    else:
        path.unlink()
    assert "</html>" in read(run_dir)


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(load_config("quickstart")))
    text = read(tmp_path)
    assert "No update has been recorded yet" in text
    assert "has not been evaluated" in text


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(load_config("quickstart")))
    write_rows(tmp_path, [evaluation(0, "before", 0.5), *(update(step) for step in range(1, 13))])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "upd')
    text = read(tmp_path)
    assert "Unfinished: 12 of 40 updates" in text
    assert "There is no evaluation after training" in text
    assert "1 torn line of metrics.jsonl" in text


def test_a_run_that_has_gone_on_from_its_end_shows_no_pictures_of_that_as_its_own(run_dir: Path) -> None:
    assert 'alt="after training"' in read(run_dir)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(update(41).model_copy(update={"max_steps": 60}).model_dump_json() + "\n")
    text = read(run_dir)
    assert "the newest, at step 40, stands in for it" in text and "Unfinished: 41 of 60" in text
    assert 'alt="after training"' not in text and 'alt="before training"' in text


def test_a_directory_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither config\.yaml nor metrics\.jsonl"):
        build_report(tmp_path)


def test_torn_samples_are_left_out(run_dir: Path) -> None:
    path = write_group(run_dir, 30, 240, [0.1, 0.9])
    path.with_suffix(".png").write_bytes(b"\x89PNG broken")
    other = write_group(run_dir, 31, 248, [0.1, 0.9])
    other.write_text("{")
    write_strip(images(3), run_dir / "samples" / "eval-after.png")
    assert read(run_dir).count('class="group"') == 2


def test_only_png_is_decoded(tmp_path: Path) -> None:
    path = write_group(tmp_path, 1, 8, [0.1, 0.9])
    Image.fromarray(images(2)[0]).save(path.with_suffix(".png"), format="JPEG")
    assert load_group(path) is None


def test_images_are_cut_where_they_were_joined(tmp_path: Path) -> None:
    told = images(11)
    (tmp_path / "samples").mkdir()
    write_grid(told, tmp_path / "samples" / "eval-before.png", columns=8)
    cut = load_eval_images(tmp_path, "before", WIDTH, HEIGHT)
    assert all(np.array_equal(np.asarray(cut[i]), told[i]) for i in range(11))


def test_tiny_images_are_exact_and_large_ones_small() -> None:
    tiny = Image.fromarray(images(1)[0])
    uri = data_uri(tiny)
    assert uri.startswith("data:image/png;base64,")
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))), images(1)[0]
    )
    large = Image.effect_noise((1024, 512), 30).convert("RGB")
    shown = Image.open(io.BytesIO(base64.b64decode(data_uri(large).partition(",")[2])))
    assert (shown.format, shown.size) == ("WEBP", (320, 160))


def test_a_group_is_whole_or_not_shown() -> None:
    with pytest.raises(ValueError, match="tesseract has 1 entries for 2 samples"):
        GroupSample(ordinal=0, prompt="", version="0.0", rewards={"ocr": [0.1, 0.2], "tesseract": [0.1]})


def test_diversity_that_was_not_measured_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(load_config("quickstart")))
    rows = [evaluation(0, "before", 0.5), update(1, last=1), evaluation(1, "after", 0.9)]
    unmeasured = [
        row.model_copy(update={"diversity": {}}) if isinstance(row, EvalRow) else row for row in rows
    ]
    write_rows(tmp_path, unmeasured)
    text = read(tmp_path)
    assert "0.900" in text
    assert "Diversity" not in text


def test_credentials_in_addresses_are_blanked(tmp_path: Path) -> None:
    """Such a configuration is refused, but one may have been written by hand."""
    written = dump_config(load_config("quickstart", ["queue.url=redis://db:6380/0"]))
    (tmp_path / "config.yaml").write_text(written.replace("redis://", "redis://user:hunter2@"))
    text = read(tmp_path)
    assert "hunter2" not in text
    assert "redis://***@db:6380/0" in text


@pytest.mark.parametrize("values", [[], [1.0], [0.5, 0.5, 0.5], [0.0, 0.0], [-3.0, 1e6], [1e-9, 3e-9]])
def test_any_series_can_be_drawn(values: list[float]) -> None:
    series = Series("x", points((float(i), value, None) for i, value in enumerate(values)))
    svg = str(line_chart("any", [series]).svg)
    assert "nan" not in svg
    assert "inf" not in svg
    assert ("nothing measured" in svg) == (not values)


def test_a_score_that_stays_at_zero_has_no_axis_below_it() -> None:
    series = Series("exact", points((float(i), 0.0, 0.0) for i in range(3)))
    labels = re.findall(r'class="ytick"[^>]*>([^<]+)<', str(line_chart("any", [series]).svg))
    assert [float(label) for label in labels] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_long_run_is_thinned_without_losing_its_mean() -> None:
    found = points((float(i), float(i % 7), None) for i in range(100_000))
    assert len(found) <= 400
    assert sum(point.y for point in found) / len(found) == pytest.approx(3.0, abs=0.01)


def test_ticks_are_round_and_cover() -> None:
    assert nice_ticks(0.0, 1.0) == (0.0, 0.25, 0.5, 0.75, 1.0)
    ticks = nice_ticks(-0.013, 0.027)
    assert ticks[0] <= -0.013
    assert ticks[-1] >= 0.027


class _Balanced(HTMLParser):
    """Every element that is opened is closed, in order."""

    VOID = frozenset({"meta", "img", "br", "line", "path", "rect", "circle", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag
