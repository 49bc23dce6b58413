"""The queue in a run where nothing breaks: order, backpressure, one transaction, errors that name things."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from queue_support import Run, version, weights

from services.embedded import EmbeddedValkey
from services.group_queue import (
    Admitted,
    Failed,
    Frontier,
    QueueError,
    QueueTimeout,
    RunEnded,
    Stopped,
    connect,
)

pytestmark = pytest.mark.integration


def test_a_whole_run_trains_every_ordinal_once_and_in_order(run: Run) -> None:
    assert run.begin() == version(0, 0)
    trained = []
    while run.fill():
        trained += run.step()
    assert trained == list(range(run.limit))
    assert run.learner.frontier() == Frontier(below=run.limit)
    status = run.learner.status()
    assert (status.depth, status.bytes, status.outstanding, status.trained) == (0, 0, 0, run.limit)
    assert status.version == version(0, 5)


def test_nothing_is_issued_before_the_learner_has_begun(run: Run) -> None:
    assert run.worker.issue("w0") is None
    run.begin()
    assert run.worker.issue("w0") is not None


def test_a_step_gets_its_groups_in_ordinal_order_however_they_came(run: Run) -> None:
    run.begin()
    for lease in reversed(run.leases()):
        run.worker.admit(run.group(lease))
    groups = run.learner.take(2, deadline_s=10)
    assert [group.header.ordinal for group in groups] == [0, 1]
    assert groups[1].tensors["latents"].equal(torch.full((2, 4), 1.0))


def test_at_staleness_0_no_ordinal_of_the_next_step_is_issued_before_its_version(run: Run) -> None:
    run.begin()
    assert run.fill() == [0, 1]
    run.learner.take(2, deadline_s=10)
    assert run.worker.issue("w0") is None
    run.commit([0, 1])
    assert {(lease.ordinal, str(lease.version)) for lease in run.leases()} == {(2, "0.1"), (3, "0.1")}


def test_the_window_allows_staleness_and_no_more(stale: Run) -> None:
    stale.begin()
    assert stale.fill() == [0, 1, 2, 3]
    assert stale.step() == [0, 1]
    assert stale.fill() == [4, 5]


def test_no_more_than_the_run_s_limit_is_ever_issued(stale: Run) -> None:
    stale.begin(limit=3)
    assert stale.fill() == [0, 1, 2]
    stale.step()
    assert stale.worker.issue("w0") is None


def test_a_group_is_admitted_once(run: Run) -> None:
    run.begin()
    first, second = run.leases()
    assert run.worker.admit_many([run.group(first), run.group(first)]) == [Admitted.OK, Admitted.DUP]
    assert run.worker.admit(run.group(second)) is Admitted.OK
    run.step()
    assert run.worker.admit(run.group(first)) is Admitted.DUP
    assert run.learner.status().depth == 0


def test_a_group_trained_out_of_order_is_known(stale: Run) -> None:
    stale.begin()
    first, _, third, _ = stale.leases()
    stale.worker.admit_many([stale.group(first), stale.group(third)])
    stale.step()
    assert stale.learner.frontier() == Frontier(below=1, above=(2,))
    assert stale.worker.admit(stale.group(third)) is Admitted.DUP


def test_a_stale_group_is_refused_and_its_ordinal_issued_again(stale: Run) -> None:
    stale.begin()
    slow = stale.worker.issue("slow")
    assert slow is not None
    for _ in range(2):
        stale.fill()
        stale.step()
    assert stale.worker.admit(stale.group(slow, worker="slow")) is Admitted.STALE
    again = stale.worker.issue("w0")
    assert again is not None
    assert (again.ordinal, again.attempt, again.version) == (slow.ordinal, 1, version(0, 2))


def test_a_group_that_gets_stale_in_the_queue_is_not_trained(stale: Run) -> None:
    stale.begin(window=6)
    assert stale.fill() == [0, 1, 2, 3, 4, 5]
    assert [stale.step(), stale.step()] == [[0, 1], [2, 3]]
    with pytest.raises(QueueTimeout, match="0 of 2 groups"):
        stale.learner.take(2, deadline_s=0.05)
    assert stale.fill()[:2] == [4, 5]
    assert {str(g.header.version) for g in stale.learner.take(2, deadline_s=10)} == {"0.2"}


def test_a_group_from_the_future_is_refused(run: Run) -> None:
    run.begin()
    lease = run.worker.issue("w0")
    assert lease is not None
    for at in (version(0, 1), version(1, 0)):
        assert run.worker.admit(run.group(lease, at=at)) is Admitted.FUTURE
    assert run.learner.status().depth == 0


def test_an_ordinal_that_was_never_issued_is_refused(run: Run) -> None:
    run.begin()
    assert run.worker.admit(run.group(9, at=version(0, 0))) is Admitted.OUTSIDE_LINEAGE


@pytest.mark.parametrize("bound", [{"max_groups": 1}, {"max_bytes": 1024}])
def test_a_full_queue_says_so_and_keeps_the_lease(
    valkey: EmbeddedValkey, run_name: str, bound: dict[str, int]
) -> None:
    run = Run(valkey, run_name, **bound)
    run.begin()
    first, second = run.leases()
    tensors = {"latents": torch.zeros(2, 64)}
    assert run.worker.admit(run.group(first, tensors=tensors)) is Admitted.OK
    assert run.worker.admit(run.group(second, tensors=tensors)) is Admitted.FULL
    assert run.worker.renew("w0", second.ordinal)
    run.learner.take(1, deadline_s=10)
    run.commit([0])
    assert run.worker.admit(run.group(second, at=version(0, 1), tensors=tensors)) is Admitted.OK


def test_a_server_without_memory_says_full_and_still_lets_the_learner_drain(
    valkey: EmbeddedValkey, run_name: str
) -> None:
    run = Run(valkey, run_name)
    run.begin()
    first, second = run.leases()
    assert run.worker.admit(run.group(first)) is Admitted.OK
    client = connect(valkey.url, valkey.password)
    client.config_set("maxmemory", 1024 * 1024)
    try:
        assert run.worker.admit(run.group(second)) is Admitted.FULL
        assert run.learner.status().depth == 1
        run.learner.take(1, deadline_s=10)
        run.commit([0])
    finally:
        client.config_set("maxmemory", 0)
    assert run.learner.frontier() == Frontier(below=1)


def test_failed_ordinals_are_issued_again_lowest_first_and_then_dead_with_a_reason(
    valkey: EmbeddedValkey, run_name: str
) -> None:
    run = Run(valkey, run_name, max_attempts=2)
    run.begin()
    run.leases()
    assert run.worker.fail("w0", 1, "reward ocr: 503") is Failed.RETRY
    assert run.worker.fail("w0", 0, "reward ocr: 503") is Failed.RETRY
    assert [(lease.ordinal, lease.attempt) for lease in run.leases()] == [(0, 2), (1, 2)]
    assert run.worker.fail("w0", 0, "reward ocr: NaN") is Failed.DEAD
    (letter,) = run.learner.dead_letters()
    assert (letter.ordinal, letter.attempts, letter.reason) == (0, 2, "reward ocr: NaN")
    # Another ordinal takes its place in the step.
    assert [lease.ordinal for lease in run.leases()] == [2]
    assert run.learner.status().dead == 1
    assert run.worker.admit(run.group(0, at=version(0, 0))) is Admitted.DUP


def test_a_dead_letter_does_not_shorten_the_run(valkey: EmbeddedValkey, run_name: str) -> None:
    run = Run(valkey, run_name, max_attempts=1)
    run.begin()
    lease = run.worker.issue("w0")
    assert lease is not None
    run.worker.fail("w0", lease.ordinal, "no score")
    trained = []
    while run.fill():
        trained += run.step()
    assert trained == list(range(1, run.limit + 1))
    assert run.learner.frontier() == Frontier(below=run.limit + 1, dead=(0,))
    assert run.learner.frontier().trained == run.limit


def test_released_ordinals_cost_no_attempt(run: Run) -> None:
    run.begin()
    for _ in range(5):
        lease = run.worker.issue("w0")
        assert lease is not None
        assert (lease.ordinal, lease.attempt) == (0, 1)
        assert run.worker.release("w0", lease.ordinal)
    assert not run.worker.release("w0", 0)


def test_only_the_holder_may_renew_release_or_fail(run: Run) -> None:
    run.begin()
    lease = run.worker.issue("w0")
    assert lease is not None
    assert not run.worker.renew("w1", lease.ordinal)
    assert not run.worker.release("w1", lease.ordinal)
    assert run.worker.fail("w1", lease.ordinal, "mine?") is Failed.RETRY
    assert run.worker.renew("w0", lease.ordinal)


def test_what_a_dead_worker_held_is_issued_again_at_once(run: Run) -> None:
    run.begin()
    run.leases("rollout-0")
    assert run.learner.release_worker("rollout-0", "killed by signal 9") == [0, 1]
    assert [(lease.ordinal, lease.attempt) for lease in run.leases("rollout-1")] == [(0, 2), (1, 2)]


def test_end_and_failure_are_different(run: Run) -> None:
    run.begin()
    assert run.learner.state() == "running"
    for state in ("draining", "failed", "done"):
        run.learner.set_state(state, "because")
        with pytest.raises(RunEnded, match=state):
            run.worker.issue("w0")
        with pytest.raises(Stopped, match=state):
            run.learner.take(2, deadline_s=10)
    assert run.learner.status().reason == "because"
    with pytest.raises(ValueError, match="starting, running"):
        run.learner.set_state("finished")  # type: ignore[arg-type]


def test_a_take_that_times_out_names_what_is_missing(run: Run) -> None:
    run.begin()
    run.fill()
    run.step()
    first, _ = run.leases("rollout-1")
    run.worker.admit(run.group(first, worker="rollout-1"))
    with pytest.raises(QueueTimeout) as caught:
        run.learner.take(2, deadline_s=0.05)
    assert "step 2 waited 0 s and has 1 of 2 groups" in str(caught.value)
    assert "ordinals 3 (leased by rollout-1 for 0 s)" in str(caught.value)


def test_a_take_that_times_out_says_why_an_ordinal_is_not_issued(run: Run) -> None:
    run.begin(limit=1)
    with pytest.raises(QueueTimeout, match=r"0 \(not issued; no worker has asked\)"):
        run.learner.take(1, deadline_s=0.05)
    run.fill()
    with pytest.raises(QueueTimeout, match=r"1 \(not issued; the run's limit of 1 groups is reached\)"):
        run.learner.take(2, deadline_s=0.05)
    run.learner.begin_epoch(weights, limit=9, window=1)
    with pytest.raises(QueueTimeout, match=r"1 \(not issued; window full\)"):
        run.learner.take(2, deadline_s=0.05)


def test_a_take_can_be_stopped_and_taken_again(run: Run) -> None:
    run.begin()
    run.fill()
    answers: Iterator[bool] = iter([False, True])
    with pytest.raises(Stopped, match="2 of 3 groups"):
        run.learner.take(3, deadline_s=60, stop=lambda: next(answers))
    assert [group.header.ordinal for group in run.learner.take(2, deadline_s=10)] == [0, 1]
    assert [group.header.ordinal for group in run.learner.take(2, deadline_s=10)] == [0, 1]


def test_the_lowest_of_the_groups_that_are_there_are_taken(stale: Run) -> None:
    stale.begin()
    leases = stale.leases()
    stale.worker.admit_many([stale.group(leases[n]) for n in (3, 2, 0)])
    assert [group.header.ordinal for group in stale.learner.take(2, deadline_s=10)] == [0, 2]


def test_commit_is_all_or_nothing(run: Run) -> None:
    run.begin()
    run.fill()
    run.learner.take(2, deadline_s=10)
    for wrong, says in (([0, 5], "5 is not in the queue"), ([0, 0], "twice")):
        with pytest.raises(QueueError, match=says):
            run.commit(wrong)
        assert run.learner.frontier() == Frontier()
        assert run.learner.latest() == weights(version(0, 0))
    with pytest.raises(ValueError, match=r"must announce 0\.1, not 0\.2"):
        run.learner.commit(weights(version(0, 2)), [0, 1])
    run.commit([0, 1])
    assert run.learner.latest() == weights(version(0, 1))
    run.fill()
    with pytest.raises(QueueError, match="1 is trained or dead already"):
        run.commit([1, 2])


def test_a_frontier_before_the_commit_is_the_one_after_it(stale: Run) -> None:
    stale.begin()
    stale.fill()
    expected = stale.learner.frontier_after([0, 2])
    stale.learner.take(4, deadline_s=10)
    stale.commit([0, 2])
    assert stale.learner.frontier() == expected == Frontier(below=1, above=(2,))
    with pytest.raises(ValueError, match=r"\[2\] are resolved"):
        stale.learner.frontier_after([1, 2])
