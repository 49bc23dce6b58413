"""The worker's loop against a real queue: whatever goes wrong, a group is whole in the queue or not there."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from reward_servers.client import RewardError, RewardInvalid
from rollout_workers.loop import RolloutLoop, SampledGroup
from rollout_workers.scoring import GroupScores
from services.codec import EncodedGroup
from services.config_file import load_config
from services.embedded import EmbeddedValkey
from services.group_queue import Admitted, Lease, NotAssigned
from services.heartbeat import Pulse
from services.messages import GroupTask, Prompt, WeightsAnnouncement
from services.policy_store import WeightsGone, WeightsMismatch
from services.prompts import group_task, prompt_source
from tests.integration.queue_support import Run, weights

pytestmark = pytest.mark.integration

CONFIG = load_config("quickstart", ["rollout.group_size=2", "learner.micro_batch=2"])


class Sampler:
    """Zeros; fails on cue."""

    def __init__(self, *, install: list[Exception] | None = None, sample: Exception | None = None) -> None:
        self._install = install or []
        self._sample = sample
        self.installed: list[str] = []

    def install(self, announcement: WeightsAnnouncement) -> None:
        if self._install:
            raise self._install.pop(0)
        self.installed.append(str(announcement.version))

    def sample(self, task: GroupTask) -> SampledGroup:
        if self._sample is not None:
            raise self._sample
        size = len(task.seeds)
        return SampledGroup(
            {"latents": torch.zeros(size, 4, 8, 16)}, np.zeros((size, 32, 64, 3), dtype=np.uint8)
        )


class Scorer:
    """Half right, half wrong; fails on cue."""

    def __init__(self, failures: Sequence[Exception] = ()) -> None:
        self._failures = list(failures)

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[Prompt], *, ordinal: int | None = None
    ) -> GroupScores:
        if self._failures:
            raise self._failures.pop(0)
        return GroupScores(rewards={"ocr": tuple(float(place % 2) for place in range(len(images)))})


def bad_answer() -> RewardError:
    return RewardInvalid("ocr", "http://127.0.0.1:1", "answered NaN")


def loop(run: Run, sampler: Sampler, scorer: Scorer, name: str = "rollout-0") -> RolloutLoop:
    queue = run.queue()
    prompts = prompt_source(CONFIG)
    pulse = Pulse(name, queue.beat, lambda ordinal: queue.renew(name, ordinal))
    return RolloutLoop(
        name,
        queue,
        sampler,
        scorer,
        lambda lease: group_task(CONFIG, prompts, run.name, lease.ordinal, lease.attempt, lease.version),
        pulse,
        poll_s=0.2,
    )


def in_background(made: RolloutLoop) -> tuple[threading.Thread, list[int]]:
    groups: list[int] = []
    thread = threading.Thread(target=lambda: groups.append(made.run()), daemon=True)
    thread.start()
    return thread, groups


@pytest.fixture
def run(valkey: EmbeddedValkey, run_name: str) -> Run:
    made = Run(valkey, run_name, steps=2, max_attempts=2)
    made.begin()
    return made


def test_groups_come_whole_and_the_loop_ends_with_the_run(run: Run) -> None:
    sampler = Sampler()
    made = loop(run, sampler, Scorer())
    thread, groups = in_background(made)
    for step in (1, 2):
        taken = run.learner.take(2, deadline_s=20)
        assert [group.header.ordinal for group in taken] == [2 * step - 2, 2 * step - 1]
        assert all(group.header.rewards == {"ocr": (0.0, 1.0)} for group in taken)
        following = taken[0].header.version.model_copy(update={"step": step})
        run.learner.commit(weights(following), [group.header.ordinal for group in taken])
    run.learner.set_state("done")
    thread.join(timeout=60)
    assert groups == [4]
    assert sampler.installed == ["0.0", "0.1"]
    assert (made._pulse.snapshot().install_s or 0.0) > 0


def test_a_worker_that_is_one_too_many_ends_behind_its_group(run: Run) -> None:
    made = loop(run, Sampler(), Scorer())
    made._unwanted = lambda: made._scoring is not None
    assert (made.run(), made.dismissed) == (1, True)
    (group,) = run.learner.take(1, deadline_s=20)
    assert group.header.rewards == {"ocr": (0.0, 1.0)}
    assert run.learner.status().leases == (), "it holds nothing that another could do"


def test_a_failed_reward_is_tried_again_and_never_trained_as_a_number(run: Run) -> None:
    thread, _ = in_background(loop(run, Sampler(), Scorer([bad_answer()])))
    taken = run.learner.take(2, deadline_s=20)
    assert [group.header.attempt for group in taken] == [2, 1]
    assert all(group.header.rewards == {"ocr": (0.0, 1.0)} for group in taken)
    run.learner.set_state("done")
    thread.join(timeout=60)


def test_an_ordinal_that_keeps_failing_is_given_up_with_the_reason(run: Run) -> None:
    thread, _ = in_background(loop(run, Sampler(), Scorer([bad_answer() for _ in range(4)])))
    taken = run.learner.take(2, deadline_s=20)
    letters = run.learner.dead_letters()
    dead = {letter.ordinal for letter in letters}
    assert dead
    assert dead.isdisjoint(group.header.ordinal for group in taken)
    assert all("answered NaN" in letter.reason for letter in letters)
    run.learner.set_state("done")
    thread.join(timeout=60)


def test_a_sampler_that_fails_ends_the_loop_with_its_error(run: Run) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        loop(run, Sampler(sample=RuntimeError("out of memory")), Scorer()).run()
    assert run.learner.status().depth == 0


def test_weights_that_do_not_bind_end_the_loop(run: Run) -> None:
    with pytest.raises(WeightsMismatch, match="bound"):
        loop(run, Sampler(install=[WeightsMismatch("3 published, 2 bound")]), Scorer()).run()
    assert run.learner.status().depth == 0


def test_weights_that_are_gone_cost_no_attempt_and_no_spinning(run: Run) -> None:
    sampler = Sampler(install=[WeightsGone("owner died") for _ in range(1000)])
    thread, _ = in_background(loop(run, sampler, Scorer()))
    time.sleep(0.5)
    assert len(sampler._install) > 900
    sampler._install.clear()
    taken = run.learner.take(2, deadline_s=20)
    assert [group.header.attempt for group in taken] == [1, 1]
    run.learner.set_state("done")
    thread.join(timeout=60)


def test_an_ordinal_without_a_prompt_is_given_back_and_costs_no_attempt(run: Run) -> None:
    made = loop(run, Sampler(), Scorer())
    task_of, refusals = made._task_of, [NotAssigned("not yet") for _ in range(2)]

    def assigned_later(lease: Lease) -> GroupTask:
        if refusals:
            raise refusals.pop()
        return task_of(lease)

    made._task_of = assigned_later
    thread, _ = in_background(made)
    taken = run.learner.take(2, deadline_s=20)
    assert [(group.header.ordinal, group.header.attempt) for group in taken] == [(0, 1), (1, 1)]
    assert not refusals
    run.learner.set_state("done")
    thread.join(timeout=60)


def test_a_full_queue_does_not_hide_that_sampling_hangs(valkey: EmbeddedValkey, run_name: str) -> None:
    """While a group waits for room the next one is sampled: that is what the worker may hang at."""
    run = Run(valkey, run_name, steps=2, max_groups=1, max_staleness=1)
    run.begin()
    sampling, go = threading.Event(), threading.Event()

    class Slow(Sampler):
        def sample(self, task: GroupTask) -> SampledGroup:
            if task.ordinal == 2:
                sampling.set()
                assert go.wait(30)
            return super().sample(task)

    made = loop(run, Slow(), Scorer())
    tried = threading.Event()
    admit = made._queue.admit

    def admitted(group: EncodedGroup) -> Admitted:
        answer = admit(group)
        if answer is Admitted.FULL and sampling.is_set():
            tried.set()
        return answer

    made._queue.admit = admitted  # type: ignore[method-assign]
    thread, _ = in_background(made)
    assert sampling.wait(30) and tried.wait(30)
    assert made._pulse.snapshot().state == "sampling"
    go.set()
    run.learner.set_state("done")
    thread.join(timeout=60)


def test_a_full_queue_holds_the_worker_and_loses_nothing(valkey: EmbeddedValkey, run_name: str) -> None:
    run = Run(valkey, run_name, steps=2, max_groups=1, max_staleness=1)
    run.begin()
    thread, _ = in_background(loop(run, Sampler(), Scorer()))
    seen = []
    for step in range(1, 5):
        (group,) = run.learner.take(1, deadline_s=20)
        seen.append(group.header.ordinal)
        run.learner.commit(
            weights(group.header.version.model_copy(update={"step": step})), [group.header.ordinal]
        )
    assert sorted(seen) == [0, 1, 2, 3]
    run.learner.set_state("done")
    thread.join(timeout=60)
