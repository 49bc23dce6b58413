"""Epochs: what a learner that comes back from a checkpoint finds, and what the one it replaced may do."""

from __future__ import annotations

import pytest
from queue_support import Run, version, weights

from services.embedded import EmbeddedValkey
from services.group_queue import Admitted, Fenced, Frontier, QueueError, StateLost, connect

pytestmark = pytest.mark.integration


def steps(run: Run, count: int) -> None:
    for _ in range(count):
        run.fill()
        run.step()


def test_the_epoch_grows_with_every_start(run: Run) -> None:
    assert run.begin() == version(0, 0)
    assert run.begin() == version(1, 0)
    steps(run, 1)
    frontier = run.learner.frontier()
    assert run.begin(checkpoint=version(1, 1), frontier=frontier) == version(2, 1)
    # A server that lost its data: the checkpoint, or what else the caller knows, keeps the epoch going up.
    assert run.begin(checkpoint=version(7, 1), frontier=frontier) == version(8, 1)
    assert run.begin(checkpoint=version(7, 1), frontier=frontier, newest_epoch=11) == version(12, 1)


def test_what_was_trained_after_the_checkpoint_is_trained_again_in_the_same_steps(run: Run) -> None:
    run.begin()
    steps(run, 1)
    checkpoint, frontier = version(0, 1), run.learner.frontier()
    steps(run, 2)
    assert run.begin(checkpoint=checkpoint, frontier=frontier) == version(1, 1)
    trained = []
    while ordinals := run.fill():
        trained.append((ordinals, run.step()))
    assert trained == [([n, n + 1], [n, n + 1]) for n in (2, 4, 6, 8)]
    assert run.learner.frontier() == Frontier(below=run.limit)


def test_a_checkpoint_written_before_the_commit_that_never_came(run: Run) -> None:
    run.begin()
    run.fill()
    groups = run.learner.take(2, deadline_s=10)
    frontier = run.learner.frontier_after([group.header.ordinal for group in groups])
    run.learner = run.queue()
    run.begin(checkpoint=version(0, 1), frontier=frontier)
    assert run.learner.status().depth == 0
    assert run.fill() == [2, 3]


def test_groups_that_the_checkpoint_has_trained_are_dropped_though_fresh(stale: Run) -> None:
    stale.begin()
    stale.fill()
    groups = stale.learner.take(2, deadline_s=10)
    frontier = stale.learner.frontier_after([group.header.ordinal for group in groups])
    stale.begin(checkpoint=version(0, 1), frontier=frontier)
    assert stale.learner.status().queued == (2, 3)
    assert stale.step() == [2, 3]


def test_a_lease_that_got_too_old_is_not_kept(stale: Run) -> None:
    stale.begin()
    old = stale.worker.issue("slow")
    assert old is not None
    steps(stale, 2)
    stale.begin(checkpoint=version(0, 2), frontier=stale.learner.frontier())
    assert not stale.worker.renew("slow", old.ordinal)
    again = stale.worker.issue("w0")
    assert again is not None
    assert (again.ordinal, again.attempt, again.version) == (old.ordinal, 1, version(1, 2))


def test_groups_taken_by_a_crashed_learner_are_delivered_to_the_next(run: Run) -> None:
    run.begin()
    run.fill()
    run.learner.take(2, deadline_s=10)
    run.learner = run.queue()
    run.begin()
    assert run.worker.issue("w0") is None
    assert [str(group.header.version) for group in run.learner.take(2, deadline_s=10)] == ["0.0", "0.0"]
    run.commit([0, 1])


def test_groups_of_versions_that_the_new_epoch_never_had_are_dropped(stale: Run) -> None:
    stale.begin()
    frontier = stale.learner.frontier()
    stale.fill()
    stale.step()
    assert stale.fill() == [4, 5]
    assert stale.learner.status().queued == (2, 3, 4, 5)
    stale.learner = stale.queue()
    stale.begin(checkpoint=version(0, 0), frontier=frontier)
    # 2 and 3 were sampled with 0.0, which the new epoch begins with; 4 and 5 with 0.1, which it never had.
    assert stale.learner.status().queued == (2, 3)
    assert stale.fill() == [0, 1]
    assert stale.step() == [0, 1]
    assert stale.fill() == [4, 5]


def test_a_group_from_outside_the_lineage_is_refused_and_its_ordinal_issued_again(run: Run) -> None:
    run.begin()
    steps(run, 1)
    late = run.worker.issue("late")
    assert late is not None
    assert late.version == version(0, 1)
    run.begin()
    assert run.worker.admit(run.group(late, worker="late")) is Admitted.OUTSIDE_LINEAGE
    assert run.learner.status().depth == 0
    assert run.fill() == [0, 1]
    assert run.step() == [0, 1]
    # At step 1 again; 0.1 has the right step and the wrong history.
    lease = run.worker.issue("late")
    assert lease is not None
    assert lease.ordinal == late.ordinal
    answer = run.worker.admit(run.group(late, worker="late"))
    assert answer is Admitted.OUTSIDE_LINEAGE
    again = run.worker.issue("late")
    assert again is not None
    assert (again.ordinal, again.attempt, again.version) == (late.ordinal, 1, version(1, 1))


def test_a_version_of_the_lineage_stays_good_over_several_epochs(stale: Run) -> None:
    stale.begin()
    lease = stale.worker.issue("slow")
    assert lease is not None
    for _ in range(3):
        stale.learner = stale.queue()
        stale.begin()
    assert stale.worker.admit(stale.group(lease, worker="slow")) is Admitted.OK


def test_epochs_that_branched_off_before_the_checkpoint_are_outside(stale: Run) -> None:
    """Checkpoint 0.2, but epoch 1 began at 0.1 and went its own way: 1.2 is not the history of 0.2."""
    stale.begin()
    steps(stale, 1)
    early = stale.learner.frontier()
    steps(stale, 1)
    late = stale.learner.frontier()
    stale.begin(checkpoint=version(0, 1), frontier=early)
    lease = stale.worker.issue("w0")
    assert lease is not None
    stale.begin(checkpoint=version(0, 2), frontier=late)
    free = stale.leases()[0]
    assert stale.worker.admit(stale.group(free, at=version(1, 2))) is Admitted.OUTSIDE_LINEAGE
    free = stale.leases()[0]
    assert stale.worker.admit(stale.group(free, at=version(0, 2))) is Admitted.OK


def test_leases_of_the_lineage_are_kept_and_others_are_not(stale: Run) -> None:
    stale.begin()
    kept = stale.worker.issue("w0")
    assert kept is not None
    stale.fill("w1")
    stale.learner.take(3, deadline_s=10)
    stale.commit([1, 2])
    dropped = stale.worker.issue("w2")
    assert dropped is not None
    stale.begin()
    assert stale.worker.renew("w0", kept.ordinal)
    assert not stale.worker.renew("w2", dropped.ordinal)


def test_the_dead_stay_dead_and_do_not_come_back_with_an_older_checkpoint(
    valkey: EmbeddedValkey, run_name: str
) -> None:
    run = Run(valkey, run_name, max_attempts=1)
    run.begin()
    lease = run.worker.issue("w0")
    assert lease is not None
    run.worker.fail("w0", lease.ordinal, "no score")
    steps(run, 1)
    run.begin()
    assert run.learner.frontier() == Frontier(below=1, dead=(0,))
    assert run.fill() == [1, 2]
    assert len(run.learner.dead_letters()) == 1


def test_a_replaced_learner_is_fenced_out_of_every_call(run: Run) -> None:
    run.begin()
    run.fill()
    run.learner.take(2, deadline_s=10)
    newer = run.queue()
    run.begin(newer)
    with pytest.raises(Fenced, match=r"at 0\.0 was replaced: the queue is at 1\.0"):
        run.learner.commit(weights(version(0, 1)), [0, 1])
    with pytest.raises(Fenced):
        run.learner.take(3, deadline_s=10)
    with pytest.raises(Fenced):
        run.learner.announce(weights(version(0, 0), "ema"))
    assert newer.frontier() == Frontier()
    assert [group.header.ordinal for group in newer.take(2, deadline_s=10)] == [0, 1]


def test_of_two_learners_that_begin_at_once_the_later_wins(run: Run) -> None:
    other = run.queue()

    def overtaken(at: object) -> object:
        if at == version(0, 0):
            run.begin(other)
        return weights(at)  # type: ignore[arg-type]

    begun = run.learner.begin_epoch(overtaken, limit=10, window=2)  # type: ignore[arg-type]
    assert begun == version(1, 0)
    with pytest.raises(Fenced):
        other.take(1, deadline_s=10)
    assert run.learner.latest() == weights(version(1, 0))


def test_a_server_that_lost_everything_is_noticed_and_refilled_from_the_checkpoint(
    valkey: EmbeddedValkey, run_name: str
) -> None:
    run = Run(valkey, run_name)
    run.begin()
    steps(run, 2)
    frontier = run.learner.frontier()
    client = connect(valkey.url, valkey.password)
    client.delete(*client.keys(f"{{dgpo:{run_name}}}:*"))
    with pytest.raises(StateLost, match="queue at none"):
        run.learner.take(2, deadline_s=10)
    with pytest.raises(StateLost):
        run.learner.commit(weights(version(0, 3)), [4, 5])
    # A checkpoint is written before the commit: it must not say that nothing was trained before.
    for look in (run.learner.frontier, lambda: run.learner.frontier_after([4, 5])):
        with pytest.raises(StateLost, match=r"learner is at 0\.2, the queue at none"):
            look()
    assert run.worker.issue("w0") is None
    assert run.begin(checkpoint=version(0, 2), frontier=frontier) == version(1, 2)
    assert run.fill() == [4, 5]
    assert run.step() == [4, 5]


def test_a_server_that_lost_the_stream_of_groups_is_noticed(run: Run, valkey: EmbeddedValkey) -> None:
    run.begin()
    connect(valkey.url, valkey.password).delete(run.raw("groups"))
    with pytest.raises(StateLost, match=r"no longer knows the learner at 0\.0"):
        run.learner.take(2, deadline_s=10)


def test_a_server_that_lost_the_last_commit_is_noticed(run: Run, valkey: EmbeddedValkey) -> None:
    run.begin()
    steps(run, 2)
    client = connect(valkey.url, valkey.password)
    client.hset(run.raw("policy"), "step", 1)
    with pytest.raises(StateLost, match=r"learner is at 0\.2, the queue at 0\.1"):
        run.learner.take(2, deadline_s=10)
    with pytest.raises(StateLost, match=r"learner is at 0\.2, the queue at 0\.1"):
        run.learner.frontier_after([4, 5])


def test_a_commit_sent_twice_is_one_commit(run: Run) -> None:
    run.begin()
    run.fill()
    run.learner.take(2, deadline_s=10)
    arguments = [0, 0, "policy", weights(version(0, 1)).model_dump_json(), 0, 1]
    scripts = run.learner._scripts
    assert scripts.run("commit", *arguments) == scripts.run("commit", *arguments) == [b"OK"]
    assert run.learner._client.xlen(run.raw("weights")) == 2
    assert run.learner.status().trained == 2


def test_an_issue_sent_twice_is_one_lease(run: Run) -> None:
    run.begin()
    first, again = (run.worker._scripts.run("issue", "w0", "nonce", 60000, 3) for _ in range(2))
    assert list(map(int, first[1:])) == list(map(int, again[1:])) == [0, 1, 0, 0]
    assert run.learner.status().outstanding == 1


@pytest.mark.parametrize("given", [{"checkpoint": version(0, 1)}, {"frontier": Frontier(below=2)}])
def test_a_checkpoint_comes_with_its_frontier(run: Run, given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="together"):
        run.begin(**given)  # type: ignore[arg-type]


def test_a_learner_that_has_not_begun_is_told_to(run: Run) -> None:
    with pytest.raises(QueueError, match="begin_epoch first"):
        run.learner.take(1, deadline_s=1)
