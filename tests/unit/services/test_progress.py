"""The terminal view, at the widths people have, and as plain lines where there is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from services.formatting import duration, number, size, sparkline
from services.messages import Heartbeat, PolicyVersion
from services.metrics import Estimate, EvalRow, EventRow, Spread, UpdateRow
from services.progress import Progress


def update(step: int) -> UpdateRow:
    return UpdateRow(
        time=0,
        epoch=0,
        step=step,
        max_steps=120,
        seconds=5.0,
        reward_mean=0.5 + step / 400,
        reward_std=0.14,
        rewards={"ocr": Spread(mean=0.5), "tesseract": Spread(mean=0.417)},
        staleness_mean=0.875,
        staleness_max=1,
        queue_depth=5,
        queue_bytes=612_345,
        groups_per_s=1.42,
        phases={
            "wait_s": 1.0,
            "forward_backward_s": 3.0,
            "publish_s": 0.1,
            "codec_s": 0.05,
            "checkpoint_s": 0.5,
        },
    )


def evaluation(step: int, score: float) -> EvalRow:
    return EvalRow(
        time=0,
        epoch=0,
        step=step,
        prompts=64,
        rewards={"ocr": Estimate(mean=score, se=0.012), "tesseract": Estimate(mean=score, se=0.013)},
        exact={"ocr": Estimate(mean=score / 2, se=0.02)},
    )


def panel(width: int, workers: int = 2) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    progress = Progress(
        "quickstart-20251122-113000-ab12", 120, heldout=("tesseract",), max_staleness=1, console=console
    )
    progress.eval_row(evaluation(0, 0.5))
    for step in range(1, 61):
        progress.update_row(update(step))
    progress.eval_row(evaluation(60, 0.81))
    progress.event_row(EventRow(time=0, level="warning", what="worker died", detail="[bold]x[/] " * 30))
    progress.heartbeats(
        [
            Heartbeat(
                part=f"rollout-{i}",
                state="sampling",
                since=0,
                version=PolicyVersion(epoch=0, step=60 - i % 2),
            )
            for i in range(workers)
        ]
    )
    progress.activity("writing a checkpoint")
    with console.capture() as captured:
        console.print(progress.render())
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_panel_fits_and_does_not_wrap(width: int) -> None:
    lines = panel(width)
    assert all(len(line) <= width for line in lines)
    labels = [line.split(" ")[0] for line in lines]
    assert labels[1:8] == ["reward", "held-out", "step", "flow", "workers", "time", "warning"]
    assert len(lines) == 9


def test_the_panel_says_what_matters_at_80_columns() -> None:
    text = "\n".join(panel(80))
    assert "60/120" in text
    assert "ETA 5:00" in text
    assert "0.650 ± 0.140" in text
    assert "0.500 → 0.810 ± 0.012" in text
    assert "exact 0.250 → 0.405 ± 0.020" in text
    assert "1.42 groups/s · queue 5 (612 kB) · staleness 0.9, max 1 of 1" in text
    assert "rollout-0 sampling · rollout-1 sampling · version lag 1" in text
    assert "5.0 s/step · fwd/bwd 60% · wait 20% · checkpoint 10% · other 10%" in text
    assert "[bold]x[/]" in text, "markup from a failing part must show as text"
    assert "writing a checkpoint" in text


def test_many_workers_are_counted() -> None:
    assert "64 sampling · version lag 0: 32, 1: 32" in "\n".join(panel(80, workers=64))


def test_without_a_terminal_there_is_one_line_an_update() -> None:
    out = io.StringIO()
    with Progress("demo", 120, heldout=("tesseract",), console=Console(file=out, width=80)) as progress:
        progress.activity("starting reward server ocr")
        progress.update_row(update(1))
        progress.update_row(update(2))
    lines = out.getvalue().splitlines()
    assert lines[0] == "starting reward server ocr"
    assert lines[1].startswith("step 1/120  reward 0.502 ± 0.140  tesseract 0.417  staleness 0.9 (max 1)")
    assert lines[2].endswith("ETA 9:50")
    assert len(lines) == 3


def test_quiet_writes_nothing() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True)
    with Progress("demo", 120, console=console, quiet=True) as progress:
        progress.update_row(update(1))
    assert out.getvalue() == ""


def test_standard_output_is_left_to_results(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("demo", 120) as progress:
        progress.update_row(update(1))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 1/120" in captured.err


def test_missing_numbers_are_dashes() -> None:
    out = io.StringIO()
    with Progress("demo", 2, console=Console(file=out, width=80)) as progress:
        progress.update_row(
            UpdateRow(time=0, epoch=0, step=1, max_steps=2, seconds=0, reward_mean=None, reward_std=None)
        )
        console = Console(file=io.StringIO(), width=80)
        console.print(progress.render())
    assert "reward - ± -" in out.getvalue()


def test_a_sparkline_never_exceeds_its_width() -> None:
    for count in range(1, 200):
        assert len(sparkline([float(i) for i in range(count)], 24)) == min(24, count)
    assert sparkline([0.3, 0.3], 8) == "▁▁"


def test_numbers_read_well() -> None:
    assert (number(None), number(0.12345), duration(59.6), duration(3600)) == (
        "-",
        "0.123",
        "1:00",
        "1:00:00",
    )
    assert [size(n) for n in (0, 999, 1000, 3_400_000, 12_345_000_000)] == [
        "0 B",
        "999 B",
        "1 kB",
        "3.4 MB",
        "12.35 GB",
    ]
