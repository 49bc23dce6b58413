"""The columns behind the curves: the lineage of `read_metrics`, and thinned curves that keep their peaks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.metrics import AnyRow
from services.run_directory import RunDirectory
from services.telemetry import METRICS_FILE, read_metrics
from services.ui.columns import Columns, thinned
from services.ui.tail import MetricsTail
from tests.unit.services.ui.made_runs import append, evaluation, update


def _row(kind: str, epoch: int, step: int, number: int) -> AnyRow:
    if kind == "update":
        return update(step, epoch=epoch, reward=float(number))
    return evaluation(step, epoch=epoch, score=float(number))


ROWS = st.lists(
    st.tuples(st.sampled_from(["update", "update", "eval"]), st.integers(0, 3), st.integers(1, 8)),
    max_size=30,
).map(lambda rows: [_row(*row, number) for number, row in enumerate(rows)])


@given(rows=ROWS)
def test_rows_in_any_order_leave_the_lineage_of_read_metrics(rows: list[AnyRow]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        append(RunDirectory(Path(folder)), rows)
        tail = MetricsTail(Path(folder) / METRICS_FILE)
        while tail.read_some(100):
            pass
        wanted = read_metrics(Path(folder))
    with tail.columns() as columns:
        assert columns.steps().tolist() == [row.step for row in wanted.updates]
        assert columns.column("reward_mean").tolist() == [row.reward_mean for row in wanted.updates]
        assert set(columns.resumes()) == {
            before.step
            for before, after in zip(wanted.updates, wanted.updates[1:], strict=False)
            if after.epoch > before.epoch
        }
    assert tail.evals() == list(wanted.evals)
    assert {row.step for row in tail.recent()} <= {row.step for row in wanted.updates}


@given(
    values=st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(float("nan"))), max_size=500),
    most=st.integers(4, 60),
)
def test_a_thinned_curve_is_bounded_and_keeps_its_ends_and_peaks(values: list[float], most: int) -> None:
    curve = np.array(values, dtype=np.float64)
    places = thinned(curve, most)
    known = curve[np.isfinite(curve)]
    assert len(places) <= most
    assert (np.diff(places) > 0).all()
    assert np.isfinite(curve[places]).all()
    if len(known):
        kept = curve[places]
        assert (kept[0], kept[-1], kept.min(), kept.max()) == (known[0], known[-1], known.min(), known.max())


def test_appended_rows_are_told_and_no_others() -> None:
    columns = Columns()
    for step in range(1, 5):
        columns.add(0, step, 100 * step, {"loss": float(step)})
    columns.add(0, 5, 500, {"loss": 5.0, "kl": 0.1})
    assert columns.rows_after(300, most=10) == {"step": [4, 5], "loss": [4.0, 5.0], "kl": [None, 0.1]}
    assert columns.rows_after(500, most=10) == {"step": [], "loss": [], "kl": []}
    assert columns.rows_after(0, most=4) is None
    assert columns.cuts == 0


def test_a_resume_is_a_cut() -> None:
    columns = Columns()
    for step in range(1, 5):
        columns.add(0, step, 100 * step, {})
    columns.add(1, 3, 500, {})
    assert columns.steps().tolist() == [1, 2, 3]
    assert columns.cuts == 1
    assert columns.resumes() == [2]
