"""Workers that wait for an ordinal: who is next, who is woken, and who loses its turn."""

from __future__ import annotations

import threading

import pytest
from queue_support import Run

from services.group_queue import Admitted, connect

pytestmark = pytest.mark.integration


def test_a_waiting_worker_is_woken_by_the_commit(run: Run) -> None:
    run.begin()
    run.fill()
    assert run.worker.issue("w0") is None
    woken = threading.Event()

    def wait() -> None:
        if run.worker.wait_for_work(timeout_s=60):
            woken.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    run.step()
    waiting.join(timeout=30)
    assert woken.is_set()


def test_who_has_waited_longest_is_next(stale: Run) -> None:
    """And nobody overtakes: not even who brings a group at that moment."""
    stale.begin()
    stale.fill("w0")
    waiting = [f"w{n}" for n in range(1, 6)]
    queues = {name: stale.queue() for name in waiting}
    for name in waiting * 2:
        assert queues[name].issue(name) is None
    assert stale.learner.status().waiting == 5
    stale.step()
    status = stale.learner.status()
    assert (status.called, status.waiting) == (("w1", "w2"), 3)
    assert not queues["w3"].wait_for_work(timeout_s=0.01)
    assert queues["w2"].wait_for_work(timeout_s=60)
    assert stale.worker.issue("w0") is None and queues["w3"].issue("w3") is None
    assert queues["w2"].issue("w2") is not None and queues["w1"].issue("w1") is not None
    stale.step()
    assert stale.learner.status().called == ("w3", "w4")


def test_who_does_not_come_when_called_loses_its_turn(run: Run) -> None:
    run.begin()
    run.fill("w0")
    queues = {name: run.queue() for name in ("w1", "w2", "w3", "w4")}
    for name, queue in queues.items():
        assert queue.issue(name) is None
    run.step()
    assert run.learner.status().called == ("w1", "w2")
    with connect(run.server.url, run.server.password) as client:
        client.zadd(run.raw("called"), {"w1": 0})
    assert queues["w4"].issue("w4") is None
    assert set(run.learner.status().called) == {"w2", "w3"}
    run.learner.release_worker("w2", "killed")
    assert set(run.learner.status().called) == {"w3", "w4"}
    assert run.learner.status().waiting == 0
    # It stands at the end of the line again.
    assert queues["w1"].issue("w1") is None and run.learner.status().waiting == 1


def test_who_comes_too_late_gets_what_is_free(run: Run) -> None:
    run.begin()
    run.fill("w0")
    late = run.queue()
    assert late.issue("late") is None
    run.step()
    with connect(run.server.url, run.server.password) as client:
        client.zadd(run.raw("called"), {"late": 0})
    assert late.issue("late") is not None


def test_the_turn_of_one_who_takes_an_expired_lease_is_the_next_one_s(run: Run) -> None:
    run.begin()
    leases = run.leases("w0")
    first, second = run.queue(), run.queue()
    assert first.issue("w1") is None and second.issue("w2") is None
    run.worker.release("w0", leases[0].ordinal)
    assert run.learner.status().called == ("w1",)
    with connect(run.server.url, run.server.password) as client:
        client.zadd(run.raw("leases"), {str(leases[1].ordinal): 0})
    taken = first.issue("w1")
    assert taken is not None and taken.ordinal == leases[1].ordinal
    assert run.learner.status().called == ("w2",)


def test_a_called_worker_keeps_its_turn_where_its_place_is_taken(run: Run) -> None:
    """By a group that comes though its lease was given back."""
    run.begin()
    leases = run.leases("w0")
    for name in ("w1", "w2"):
        assert run.worker.issue(name) is None
    run.worker.release("w0", leases[0].ordinal)
    assert run.learner.status().called == ("w1",)
    assert run.worker.admit(run.group(leases[0])) is Admitted.OK
    assert run.worker.issue("w1") is None
    run.worker.release("w0", leases[1].ordinal)
    assert run.learner.status().called == ("w1",)
    assert run.worker.issue("w1") is not None


def test_a_wake_up_between_issue_and_wait_is_not_missed(run: Run) -> None:
    run.begin()
    run.fill()
    assert run.worker.issue("w0") is None
    run.step()
    assert run.worker.wait_for_work(timeout_s=60)
    assert not run.worker.wait_for_work(timeout_s=0.01)


def test_a_worker_that_waits_for_the_first_learner_sleeps(run: Run) -> None:
    run.learner.set_state("starting")
    for _ in range(2):
        assert run.worker.issue("w0") is None
        assert not run.worker.wait_for_work(timeout_s=0.01)
    run.begin()
    assert run.worker.wait_for_work(timeout_s=60)


@pytest.mark.parametrize("state", ["draining", "failed"])
def test_a_waiting_worker_is_woken_by_the_end(run: Run, state: str) -> None:
    run.begin()
    run.fill()
    assert run.worker.issue("w0") is None
    run.learner.set_state(state)  # type: ignore[arg-type]
    assert run.worker.wait_for_work(timeout_s=60)
