"""What observers read: heartbeats that are missed when they stop, announcements, metrics, status."""

from __future__ import annotations

import pytest
from queue_support import Run, version, weights

from services.messages import Heartbeat
from services.queue_board import METRICS_ROWS

pytestmark = pytest.mark.integration


def beat(part: str, state: str = "sampling") -> Heartbeat:
    return Heartbeat(part=part, state=state, since=1.0, version=version(0, 1), pid=7, groups=3)


def test_a_part_that_falls_silent_is_missed(run: Run) -> None:
    run.worker.beat(beat("rollout-0"))
    run.worker.beat(beat("rollout-1"))
    run.worker.beat(beat("rollout-1", "scoring"))
    assert run.learner.heartbeats() == {
        "rollout-0": beat("rollout-0"),
        "rollout-1": beat("rollout-1", "scoring"),
    }
    run.worker._client.delete(run.raw("hb:rollout-0"))
    assert run.learner.heartbeats()["rollout-0"] is None


def test_a_heartbeat_has_a_time_to_live(run: Run) -> None:
    run.worker.beat(beat("rollout-0"), ttl_s=20.0)
    assert 0 < run.worker._client.pttl(run.raw("hb:rollout-0")) <= 20_000


def test_the_newest_announcement_of_each_kind_is_kept(run: Run) -> None:
    run.begin()
    run.learner.announce(weights(version(0, 0), "ema"))
    run.fill()
    run.step()
    assert run.worker.latest("ema") == weights(version(0, 0), "ema")
    assert run.worker.latest("policy") == weights(version(0, 1))


def test_announcements_stay_few(run: Run) -> None:
    run.begin()
    for _ in range(20):
        run.learner.announce(weights(version(0, 0), "ema"))
    assert run.worker._client.xlen(run.raw("weights")) == 16
    assert run.worker.latest("policy") == weights(version(0, 0))


def test_metrics_are_read_on_from_an_id(run: Run) -> None:
    for step in range(3):
        run.learner.append_metrics({"step": step, "reward_mean": 0.5})
    rows = run.worker.read_metrics()
    assert [row["step"] for _, row in rows] == [0, 1, 2]
    assert [row["step"] for _, row in run.worker.read_metrics(rows[1][0])] == [2]
    assert run.worker.read_metrics(rows[2][0]) == []


def test_metrics_that_nobody_moves_stay_few_and_are_the_newest(run: Run) -> None:
    for step in range(2 * METRICS_ROWS):
        run.learner.append_metrics({"step": step})
    rows = run.worker.read_metrics(count=2 * METRICS_ROWS)
    # Redis lets whole nodes go, of a hundred rows.
    assert METRICS_ROWS <= len(rows) <= METRICS_ROWS + 100
    assert rows[-1][1]["step"] == 2 * METRICS_ROWS - 1


def test_who_comes_later_goes_on_behind_the_metrics_that_were_written_down(run: Run) -> None:
    assert run.learner.last_written_metrics() == "0-0"
    run.learner.append_metrics({"step": 0})
    ((row_id, _),) = run.learner.read_metrics()
    run.learner.metrics_written(row_id)
    run.learner.append_metrics({"step": 1})
    assert [row["step"] for _, row in run.worker.read_metrics(run.worker.last_written_metrics())] == [1]


def test_status_shows_who_holds_what(run: Run) -> None:
    run.begin()
    run.worker.issue("rollout 1")
    lease = run.worker.issue("rollout-2")
    assert lease is not None
    run.worker.admit(run.group(lease, worker="rollout-2"))
    run.learner.set_state("degraded", "reward ocr is slow")
    status = run.learner.status()
    assert [(held.ordinal, held.worker, held.attempt, held.version) for held in status.leases] == [
        (0, "rollout 1", 1, version(0, 0))
    ]
    assert status.leases[0].age_s >= 0
    assert 0 < status.leases[0].expires_in_s <= run.config.lease_s
    assert (status.state, status.reason) == ("degraded", "reward ocr is slow")
    assert (status.depth, status.queued, status.outstanding, status.next) == (1, (1,), 2, 2)
    assert (status.window, status.limit, status.version) == (2, 10, version(0, 0))
    assert status.bytes > 0
    run.worker.release("rollout 1", 0)
    assert (run.learner.status().issuable, run.learner.status().issuable_count) == ((0,), 1)
