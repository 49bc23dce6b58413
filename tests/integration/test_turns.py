"""Turns on a card, on a real server: one part at a time, and none that waits for a dead one."""

from __future__ import annotations

import pytest
from queue_support import Run

from services.group_queue import QueueTimeout
from services.queue_turn import Turn, TurnLost

pytestmark = pytest.mark.integration


def turns(run: Run, lease_s: float) -> tuple[Turn, Turn]:
    return run.queue().turn("rollout-0", lease_s), run.queue().turn("learner-0", lease_s)


def test_one_part_has_the_turn_and_who_waits_names_it(run: Run) -> None:
    worker, learner = turns(run, 60.0)
    worker.take(1.0)
    assert worker.held
    with pytest.raises(QueueTimeout, match=r"learner-0 waited 0\.2 s for its turn; rollout-0 has it"):
        learner.take(0.2)
    worker.give()
    learner.take(1.0)
    assert (worker.held, learner.held) == (False, True)


def test_the_turn_of_a_dead_part_ends_with_its_lease(run: Run) -> None:
    worker, learner = turns(run, 0.2)
    worker.take(1.0)
    learner.take(30.0)
    with pytest.raises(TurnLost, match="rollout-0 has lost its turn"):
        worker.give()
    assert not worker.held


def test_a_turn_that_others_have_had_meanwhile_is_lost_though_it_was_taken_again(run: Run) -> None:
    worker, learner = turns(run, 0.2)
    worker.take(1.0)
    learner.take(30.0)
    learner.give()
    worker.renew()
    with pytest.raises(TurnLost, match="its lease had ended"):
        worker.give()
    # And where nobody has it by then.
    worker.take(1.0)
    learner.take(30.0)
    learner.give()
    with pytest.raises(TurnLost, match="its lease had ended"):
        worker.give()


def test_a_part_that_is_made_anew_ends_the_turn_of_its_former_life(run: Run) -> None:
    former, learner = turns(run, 60.0)
    former.take(1.0)
    with pytest.raises(QueueTimeout, match="rollout-0 has it"):
        learner.take(0.1)
    anew = run.queue().turn("rollout-0", 60.0)
    anew.take(1.0)
    anew.give()
    learner.take(1.0)
    with pytest.raises(TurnLost, match="learner-0 has it"):
        former.give()


def test_a_turn_that_is_renewed_does_not_end(run: Run) -> None:
    worker, learner = turns(run, 3.0)
    worker.take(1.0)
    for _ in range(24):
        with pytest.raises(QueueTimeout):
            learner.take(0.15)
        worker.renew()
    worker.give()
    worker.renew()
    learner.take(1.0)


def test_a_server_that_has_lost_its_data_gives_the_turn_back(run: Run) -> None:
    worker, learner = turns(run, 60.0)
    worker.take(1.0)
    run.worker._client.delete(run.worker._keys.key("turn"))
    worker.renew()
    with pytest.raises(QueueTimeout, match="rollout-0 has it"):
        learner.take(0.2)
    worker.give()
    # Given with an answer that was lost, and again; or the server lost its data in between.
    worker.take(1.0)
    run.worker._client.delete(run.worker._keys.key("turn"))
    worker.give()
    assert not worker.held


def test_turns_of_two_runs_have_nothing_to_do_with_each_other(run: Run) -> None:
    worker, _ = turns(run, 60.0)
    other, _ = turns(Run(run.server, f"{run.name}-2"), 60.0)
    worker.take(1.0)
    other.take(1.0)
