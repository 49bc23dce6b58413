"""The queue against a model of it: any order of what parties do and how they die, then the invariants.

What must hold, whatever happens: an ordinal is trained at most once within the surviving lineage; no group is
trained that is stale, from the future or from outside the lineage; the window is kept; nothing is lost.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from queue_support import Run, version, weights

from services.codec import Group
from services.embedded import EmbeddedValkey
from services.group_queue import (
    Admitted,
    Failed,
    Fenced,
    Frontier,
    GroupQueue,
    Lease,
    QueueTimeout,
    connect,
)
from services.messages import PolicyVersion

pytestmark = pytest.mark.integration

WORKERS = st.sampled_from(["w0", "w1", "w2"])
MAX_STALENESS = 1
GROUPS_PER_STEP = 2
STEPS = 6


@dataclass
class Checkpoint:
    at: PolicyVersion
    frontier: Frontier
    history: list[PolicyVersion]
    trained: set[int]


@dataclass
class Model:
    """What is true of the run, kept apart from the server."""

    at: PolicyVersion
    history: list[PolicyVersion] = field(default_factory=list)
    """Versions of the surviving lineage, oldest first."""
    trained: set[int] = field(default_factory=set)
    dead: set[int] = field(default_factory=set)


class QueueMachine(RuleBasedStateMachine):
    server: EmbeddedValkey

    def __init__(self) -> None:
        super().__init__()
        self.run = Run(
            self.server,
            f"model-{uuid.uuid4().hex[:12]}",
            groups_per_step=GROUPS_PER_STEP,
            steps=STEPS,
            max_staleness=MAX_STALENESS,
            max_attempts=3,
        )
        self.client = connect(self.server.url, self.server.password)
        self.leases: list[tuple[str, Lease]] = []
        self.checkpoint: Checkpoint | None = None
        self.zombies: list[GroupQueue] = []
        self.taken: list[Group] = []
        at = self.run.begin()
        self.model = Model(at=at, history=[at])

    @rule(worker=WORKERS)
    def issue(self, worker: str) -> None:
        before = self.run.learner.status()
        lease = self.run.worker.issue(worker)
        if lease is None:
            kept = before.outstanding + len(set(before.called) - {worker})
            assert kept >= before.window or before.trained + kept >= before.limit, (
                "a worker had to wait though there was room"
            )
            return
        assert lease.ordinal not in self.model.trained | self.model.dead
        assert lease.version == self.model.at
        if before.issuable and not before.leases:
            assert lease.ordinal == before.issuable[0], "not the lowest first"
        self.leases.append((worker, lease))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), behind=st.integers(0, 2), keep=st.booleans())
    def admit(self, data: st.DataObject, behind: int, keep: bool) -> None:
        """Any lease ever given, once or more often, with its own version or a newer one of the history."""
        worker, lease = data.draw(st.sampled_from(self.leases))
        if not keep:
            self.leases.remove((worker, lease))
        known = [at for at in self.model.history if at >= lease.version]
        at = known[max(0, len(known) - 1 - behind)] if known else lease.version
        answer = self.run.worker.admit(self.run.group(lease, at=at, worker=worker))
        if lease.ordinal in self.model.trained | self.model.dead:
            assert answer in (Admitted.DUP, Admitted.OUTSIDE_LINEAGE)
        if answer is Admitted.OK:
            assert at in self.model.history
            assert self.model.at.step - at.step <= MAX_STALENESS

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), give_back=st.booleans())
    def fail(self, data: st.DataObject, give_back: bool) -> None:
        worker, lease = data.draw(st.sampled_from(self.leases))
        if give_back:
            self.run.worker.release(worker, lease.ordinal)
        elif self.run.worker.fail(worker, lease.ordinal, "no score") is Failed.DEAD:
            self.model.dead.add(lease.ordinal)

    @rule(worker=WORKERS)
    def worker_dies(self, worker: str) -> None:
        self.run.learner.release_worker(worker, "killed")
        self.note_the_dead()

    @rule()
    def leases_expire(self) -> None:
        for held in self.run.learner.status().leases:
            self.client.zadd(self.run.raw("leases"), {str(held.ordinal): 0})
        self.run.worker.issue("w0")
        self.note_the_dead()
        self.leases += [
            (held.worker, Lease(held.ordinal, held.attempt, held.version))
            for held in self.run.learner.status().leases
            if held.worker == "w0"
        ]

    def note_the_dead(self) -> None:
        self.model.dead |= {letter.ordinal for letter in self.run.learner.dead_letters()}

    @rule(commit=st.booleans())
    def step(self, commit: bool) -> None:
        try:
            groups = self.run.learner.take(GROUPS_PER_STEP, deadline_s=0)
        except QueueTimeout:
            return
        ordinals = [group.header.ordinal for group in groups]
        assert ordinals == sorted(set(ordinals))
        for group in groups:
            assert group.header.version in self.model.history, "trained from outside the lineage"
            assert 0 <= self.model.at.step - group.header.version.step <= MAX_STALENESS
            assert group.header.ordinal not in self.model.trained, "trained twice"
            assert group.header.ordinal not in self.model.dead, "the dead came back"
        if not commit:
            return
        self.model.at = self.run.commit(ordinals)
        self.model.history.append(self.model.at)
        self.model.trained |= set(ordinals)

    @rule()
    def save_checkpoint(self) -> None:
        self.checkpoint = Checkpoint(
            self.model.at, self.run.learner.frontier(), list(self.model.history), set(self.model.trained)
        )

    @rule()
    def learner_dies(self) -> None:
        """Another process goes on from the checkpoint; the old one may live on as a zombie."""
        self.zombies.append(self.run.learner)
        self.run.learner = self.run.queue()
        saved = self.checkpoint
        if saved is None:
            at = self.run.begin()
            self.model.history, self.model.trained = [version(e, 0) for e in range(at.epoch)], set()
        else:
            at = self.run.begin(checkpoint=saved.at, frontier=saved.frontier)
            # Epochs since then that went no further than the checkpoint share its weights at that step.
            self.model.history, self.model.trained = list(saved.history), set(saved.trained)
            self.model.history += [version(e, at.step) for e in range(saved.at.epoch + 1, at.epoch)]
        assert at > self.model.at
        self.model.at = at
        self.model.history.append(at)

    @precondition(lambda self: self.zombies)
    @rule(data=st.data())
    def zombie_acts(self, data: st.DataObject) -> None:
        zombie = data.draw(st.sampled_from(self.zombies))
        at = zombie._at()
        with pytest.raises(Fenced):
            zombie.commit(weights(version(at.epoch, at.step + 1)), [0, 1])
        with pytest.raises(Fenced):
            zombie.take(1, deadline_s=0)

    @invariant()
    def the_server_agrees(self) -> None:
        status = self.run.learner.status()
        self.note_the_dead()
        frontier = self.run.learner.frontier()
        assert status.version == self.model.at
        assert {n for n in range(status.next) if frontier.resolved(n)} == self.model.trained | self.model.dead
        assert (status.trained, status.dead) == (len(self.model.trained), len(self.model.dead))
        assert frontier.trained == status.trained

    @invariant()
    def nothing_is_lost_and_nothing_is_in_two_places(self) -> None:
        status = self.run.learner.status()
        leased = [held.ordinal for held in status.leases]
        resolved = self.model.trained | self.model.dead
        places = sorted([*leased, *status.queued, *status.issuable, *resolved])
        assert status.issuable_count == len(status.issuable) or status.issuable_count > 16
        if status.issuable_count <= 16:
            assert places == list(range(status.next))
        assert self.client.xlen(self.run.raw("groups")) == status.depth
        assert status.bytes == 0 or status.depth > 0

    @invariant()
    def the_limit_is_kept(self) -> None:
        status = self.run.learner.status()
        assert status.trained <= status.limit

    def teardown(self) -> None:
        """From wherever it is, the run can be finished: every ordinal trained once, or dead."""
        for _ in range(200):
            if len(self.model.trained) >= self.run.limit:
                break
            for held in self.run.learner.status().leases:
                self.client.zadd(self.run.raw("leases"), {str(held.ordinal): 0})
            # Nobody else is left to take its turn.
            self.client.delete(self.run.raw("line"), self.run.raw("called"))
            for lease in self.run.leases("closer"):
                self.run.worker.admit(self.run.group(lease, worker="closer"))
            self.finish_step()
        assert len(self.model.trained) == self.run.limit
        assert not self.model.trained & self.model.dead

    def finish_step(self) -> None:
        groups = self.run.learner.take(GROUPS_PER_STEP, deadline_s=10)
        ordinals = [group.header.ordinal for group in groups]
        assert not self.model.trained & set(ordinals)
        self.model.at = self.run.commit(ordinals)
        self.model.trained |= set(ordinals)


def test_the_queue_behaves_as_its_model(valkey: EmbeddedValkey) -> None:
    QueueMachine.server = valkey
    run_state_machine_as_test(
        QueueMachine,
        settings=settings(
            max_examples=25,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
