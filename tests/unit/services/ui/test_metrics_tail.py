"""metrics.jsonl read as it grows: each byte once, torn lines, other files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.metrics import AnyRow, EventRow
from services.run_directory import RunDirectory
from services.telemetry import METRICS_FILE
from services.ui import tail as tail_module
from services.ui.tail import Cursor, MetricsTail
from tests.unit.services.ui.made_runs import append, update


def _read(tail: MetricsTail) -> None:
    while tail.read_some():
        pass


def _steps(tail: MetricsTail) -> list[float]:
    with tail.columns() as columns:
        found: list[float] = columns.steps().tolist()
        return found


def test_a_file_that_is_not_there_yet_is_a_run_that_has_not_begun(tmp_path: Path) -> None:
    tail = MetricsTail(tmp_path / METRICS_FILE)
    assert not tail.read_some()
    append(RunDirectory(tmp_path), [update(1)])
    _read(tail)
    assert _steps(tail) == [1]


def test_a_line_is_taken_when_it_is_whole_and_no_byte_twice(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    first, second = (update(step).model_dump_json() + "\n" for step in (1, 2))
    path.write_text(first + second[:40])
    tail = MetricsTail(path)
    _read(tail)
    assert _steps(tail) == [1]
    assert tail.cursor == Cursor(0, len(first))
    with path.open("a") as file:
        file.write(second[40:])
    _read(tail)
    assert _steps(tail) == [1, 2]
    assert tail.bytes_read == path.stat().st_size
    assert tail.unreadable == 0


def test_a_cursor_is_never_ahead_of_the_rows_that_it_stands_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(RunDirectory(tmp_path), [update(1), update(2)])
    tail, parse, seen = MetricsTail(tmp_path / METRICS_FILE), tail_module.parse_row, list[int]()

    def looked_at(line: bytes) -> AnyRow:
        seen.append(tail.cursor.end)
        return parse(line)

    monkeypatch.setattr(tail_module, "parse_row", looked_at)
    _read(tail)
    assert seen == [0, 0] and tail.cursor.end == tail.size


def test_a_line_torn_by_a_crash_costs_that_line(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text(update(1).model_dump_json()[:50] + "\n" + update(2).model_dump_json() + "\n\n")
    tail = MetricsTail(path)
    _read(tail)
    assert _steps(tail) == [2]
    assert tail.unreadable == 1


def test_a_line_without_end_is_not_gathered_in_memory(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_bytes(
        b"x" * (tail_module.MAX_LINE + 10) + b"\n" + update(1).model_dump_json().encode() + b"\n"
    )
    tail = MetricsTail(path)
    _read(tail)
    assert _steps(tail) == [1]
    assert tail.unreadable == 1


def test_a_shorter_or_another_file_is_read_from_its_beginning(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    append(run, [update(1), update(2), update(3)])
    tail = MetricsTail(tmp_path / METRICS_FILE)
    _read(tail)
    known = tail.cursor
    other = tmp_path / "other"
    other.write_text(update(7).model_dump_json() + "\n")
    os.replace(other, tmp_path / METRICS_FILE)  # noqa: PTH105
    _read(tail)
    assert _steps(tail) == [7]
    assert tail.cursor.cuts != known.cuts
    assert tail.rows_after(known, most=10)[1] is None


def test_what_was_appended_since_a_cursor(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    append(run, [update(1), update(2)])
    tail = MetricsTail(tmp_path / METRICS_FILE)
    _read(tail)
    told = tail.cursor
    append(run, [EventRow(time=1.0, what="resumed"), update(3)])
    _read(tail)
    now, rows = tail.rows_after(told, most=10)
    assert rows is not None
    assert rows["step"] == [3]
    assert tail.rows_after(now, most=10)[1] == {name: [] for name in rows}
    assert tail.rows_after(Cursor(0, now.end + 1), most=10)[1] is None
    assert [event.what for event in tail.events()] == ["resumed"]
