"""Watches a run until it ends: moves metrics to the run directory, orders evaluations, judges failures.

Promises
- A failure of any part ends `watch` with an exception that names it; the end of the work ends it normally.
- Nothing is waited for in silence: a part without a heartbeat is named, with what it was doing last. A worker
  that stays silent for `rollout.hang_s` is killed and made anew; a learner that does ends the run.
- As many workers are kept as the queue is told (`dgpo scale`).
- A guard that fires is an event; with `guard.action: stop` the run drains and says why.
- Evaluations happen when services/evaluation_schedule.py says; a run that is done has the one after training.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from learner.ray_train import LearnerFailed
from services.context import RunContext
from services.evaluation_schedule import EvaluationSchedule
from services.formatting import reason
from services.group_queue import GroupQueue
from services.guard import Guard
from services.memory import peak_memory
from services.messages import Heartbeat, PolicyVersion, WeightsAnnouncement
from services.metrics import AnyRow, MemoryRow, UpdateRow, row_of
from services.progress import Progress
from services.queue_keeper import QueueKeeper
from services.queue_types import RunState
from services.ray_metrics import RunMetrics
from services.reward_scaling import RewardScaling
from services.run_directory import RunDirectory
from services.stop_signals import StopSignals
from services.supervisor import PartFailed, Supervisor
from services.telemetry import Telemetry, read_metrics

POLL_S = 0.5
DEAD_LETTER = "dead letter"
GUARD = "guard fired"


@dataclass(frozen=True)
class Outcome:
    """How a run ended; a failed one raises instead."""

    run: RunDirectory
    interrupted: bool
    version: PolicyVersion
    weights_digest: str
    """Of the weights announced for rollouts behind the last step: the policy's, or the EMA reference's after
    `objective.switch_step`."""
    seconds: float
    """From the start of the learner to its end, model loading included."""
    guard: str | None = None
    """Why the guard has ended the run early, if it has."""


class LearnerThread:
    """The learner's blocking `fit` in a thread of the driver, with its error kept."""

    def __init__(self, fit: Callable[[], None]) -> None:
        self._fit = fit
        self._thread = threading.Thread(target=self._run, name="learner", daemon=True)
        self.error: BaseException | None = None
        self.started = time.monotonic()

    def start(self) -> None:
        self._thread.start()

    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._fit()
        except BaseException as error:  # handed to the driver's thread, which raises it
            self.error = error


class Monitor:
    """Everything between the start and the end of a run; made by the driver."""

    def __init__(
        self,
        context: RunContext,
        queue: GroupQueue,
        telemetry: Telemetry,
        metrics: RunMetrics,
        view: Progress,
        evaluator: Any,
        supervisor: Supervisor,
        learner: LearnerThread,
        signals: StopSignals,
        keeper: QueueKeeper | None,
        scale_reward: Callable[[str, int], None],
    ) -> None:
        self._context = context
        self._queue = queue
        self._telemetry = telemetry
        self._metrics = metrics
        self._view = view
        self._supervisor = supervisor
        self._learner = learner
        self._signals = signals
        self._keeper = keeper
        self._own_rewards = [one.name for one in context.config.rewards if one.app is not None]
        self._scaling = RewardScaling(scale_reward)
        self._wanted = context.config.rollout.workers
        self._told: tuple[RunState, str] = ("running", "")
        # A resumed run's server may remember what the driver before this one has written down.
        self._last_row_id = queue.last_written_metrics()
        written = read_metrics(context.directory)
        self._dead_told = {row.ordinal for row in written.events if row.what == DEAD_LETTER}
        self._draining = False
        self._guard = Guard(context.config)
        self._guard.remember((*written.updates, *written.evals))
        self._guarded: str | None = None
        self._evaluations = EvaluationSchedule(
            context.config,
            evaluator,
            {(row.step, row.when) for row in written.evals},
            on_row=self._write,
            on_gone=self._put_off,
        )
        self._beats: dict[str, Heartbeat] = {}
        self._silent: dict[str, float] = {}
        """Part -> since when (monotonic)."""
        self._died: set[str] = set()
        """Workers that nothing has been heard of since their last life."""

    def watch(self) -> Outcome:
        """Returns when the run is done or drained; raises when it failed."""
        while self._learner.running():
            self._turn()
        self._turn()
        if self._learner.error is not None:
            error = self._learner.error
            why = str(error) if isinstance(error, LearnerFailed) else reason(error)
            ranks = self._context.config.learner.ranks
            log = self._context.run_directory.logs / ("learner-0.log" if ranks == 1 else "learner-*.log")
            raise PartFailed(f"the learner failed: {why}; its log: {log}") from error
        seconds = time.monotonic() - self._learner.started
        policy = self._latest("policy")
        interrupted = self._draining and policy.version.step < self._context.config.learner.max_steps
        self._queue.set_state("draining" if interrupted else "done")
        if not interrupted and self._evaluations.possible:
            self._view.activity("evaluating the trained model on held-out prompts")
            self._evaluations.finish(self._latest("ema"), self._evaluator_state)
        self._telemetry.write(MemoryRow(time=time.time(), parts=peak_memory(self._beats.values())))
        return Outcome(
            run=self._context.run_directory,
            interrupted=interrupted,
            version=policy.version,
            weights_digest=policy.digest,
            seconds=seconds,
            guard=self._guarded if interrupted else None,
        )

    def _turn(self) -> None:
        if (self._signals.requested.is_set() or self._guarded) and not self._draining:
            self._draining = True
            self._view.activity("stopping: what is under way is finished, then comes a checkpoint")
            self._queue.set_state("draining")
        self._tell_state()
        self._watch_queue_server()
        wanted = self._queue.wanted_workers()
        if wanted is None:
            self._say_again()
        self._wanted = wanted or self._wanted
        if not self._draining and not self._context.config.offline:
            self._supervisor.resize(self._wanted, self._beats)
        self._scale_rewards()
        self._supervisor.poll(POLL_S)
        self._move_metrics()
        self._watch_heartbeats()
        self._count_dead_letters()
        self._evaluations.poll(self._queue.latest("ema"))

    def _tell_state(self) -> None:
        """Degraded, while a part is silent or a worker waits for its next life."""
        if self._draining:
            self._metrics.state("draining")
            return
        problems = [f"no heartbeat of {part}" for part in sorted(self._silent)]
        problems += [f"{part} died and is made anew" for part in self._supervisor.restarting()]
        state: RunState = "degraded" if problems else "running"
        self._metrics.state(state)
        if (state, "; ".join(problems)) != self._told:
            self._told = state, "; ".join(problems)
            self._queue.set_state(*self._told)

    def _say_again(self) -> None:
        """To a queue server that has lost its data: what the driver has said before."""
        # Ids of rows follow its clock: where that went back, new ones are below those of before.
        self._last_row_id = self._queue.last_written_metrics()
        self._queue.want_workers(self._wanted)
        for name, count in self._scaling.asked.items():
            self._queue.want_replicas(name, count)
        if self._draining:
            self._queue.set_state("draining")
        else:
            self._queue.set_state(*self._told)

    def _scale_rewards(self) -> None:
        """As `dgpo scale` says."""
        if self._draining:
            return
        for what, detail, failed in self._scaling.turn(self._queue.wanted_replicas(self._own_rewards)):
            self._view.row(self._telemetry.event(what, detail, level="warning" if failed else "info"))

    def _watch_queue_server(self) -> None:
        for detail in self._keeper.news() if self._keeper is not None else ():
            self._view.row(self._telemetry.event("queue server died", detail, level="warning"))

    def _move_metrics(self) -> None:
        while rows := self._queue.read_metrics(self._last_row_id):
            for row_id, row in rows:
                self._last_row_id = row_id
                self._write(self._with_probe_error(row_of(row)))
            self._queue.metrics_written(self._last_row_id)

    def _with_probe_error(self, row: AnyRow) -> AnyRow:
        """Only heartbeats tell it: it belongs to weights that a worker has installed, not to groups."""
        found = [beat.probe_error for beat in self._beats.values() if beat.probe_error is not None]
        return (
            row.model_copy(update={"probe_error": max(found)})
            if isinstance(row, UpdateRow) and found
            else row
        )

    def _write(self, row: AnyRow) -> None:
        self._telemetry.write(row)
        self._view.row(row)
        for fall in self._guard.observe(row):
            self._view.row(self._telemetry.event(GUARD, str(fall), level="warning", step=fall.now.step))
            if self._context.config.guard.action == "stop":
                self._guarded = self._guarded or str(fall)

    def _watch_heartbeats(self) -> None:
        alive, now = self._move_heartbeats(), time.monotonic()
        silent = set(self._beats) - set(alive)
        for part in () if self._draining else silent - set(self._silent) - self._died:
            self._view.row(self._telemetry.event("no heartbeat", self._last_seen(part), level="warning"))
        self._silent = {part: self._silent.get(part, now) for part in silent}
        self._died -= set(alive)
        for part in silent - self._died:
            self._end_if_lost(part, now - self._silent[part])

    def _end_if_lost(self, part: str, seconds: float) -> None:
        """A process that is stopped, or cut off from the queue, says nothing and does not die."""
        config = self._context.config
        why = f"no heartbeat for {seconds:.0f} s; {self._last_seen(part)}"
        if part.startswith("learner-"):
            if seconds > config.learner.hang_s:
                raise PartFailed(f"{why}; go on with --resume")
        elif seconds > config.rollout.hang_s:
            self._supervisor.end(part, why)

    def _last_seen(self, part: str) -> str:
        last = self._beats[part]
        return f"{part}: last seen {last.state!r} since {time.time() - last.since:.0f} s"

    def _move_heartbeats(self) -> dict[str, Heartbeat]:
        alive = {part: beat for part, beat in self._queue.heartbeats().items() if beat is not None}
        newest = self._queue.latest("policy")
        self._metrics.beats(alive.values(), newest.version if newest is not None else None)
        self._view.heartbeats(list(alive.values()))
        for part, beat in alive.items():
            before = self._beats.get(part)
            # Workers' deaths are told by who makes them anew.
            kind = part.partition("-")[0]
            if kind in ("learner", "evaluator") and before is not None and before.pid != beat.pid:
                detail = f"{part}: process {beat.pid} in place of {before.pid}, last seen {before.state!r}"
                self._view.row(self._telemetry.event(f"{kind} restarted", detail, level="warning"))
        self._beats |= alive
        return alive

    def worker_died(self, part: str, why: str) -> None:
        """What it held is issued again; what it was doing is told."""
        self._queue.release_worker(part, why)
        # Its last heartbeat lives on for a while, and is none of its next life.
        self._queue.forget(part)
        self._died.add(part)
        last = self._beats.get(part)
        detail = f"{part}: {why}" if last is None else f"{part}: {why}; last seen {last.state!r}"
        self._view.row(self._telemetry.event("worker died", detail, level="warning"))

    def worker_left(self, part: str) -> None:
        """It was one too many: it stands in line no more, and is no silent one."""
        self._queue.release_worker(part, "it was one too many")
        self._queue.forget(part)
        self._metrics.forget(part)
        self._beats.pop(part, None)
        self._silent.pop(part, None)
        self._died.discard(part)
        self._view.row(self._telemetry.event("worker left", part))

    def _count_dead_letters(self) -> None:
        letters = self._queue.dead_letters()
        for letter in letters:
            if letter.ordinal not in self._dead_told:
                self._dead_told.add(letter.ordinal)
                self._view.row(
                    self._telemetry.event(DEAD_LETTER, letter.reason, level="warning", ordinal=letter.ordinal)
                )
        if len(letters) > self._context.config.queue.max_dead:
            raise PartFailed(
                f"{len(letters)} ordinals were given up (queue.max_dead "
                f"{self._context.config.queue.max_dead}); the last one, {letters[-1].ordinal}, because: "
                f"{letters[-1].reason}; they stay given up: to go on, --resume with --set "
                f"queue.max_dead=N, N at least {len(letters)}"
            )

    def _put_off(self, announced: WeightsAnnouncement, when: str) -> None:
        step = announced.version.step
        detail = f"{when} training, step {step}: nobody has the weights {announced.version} any more"
        self._view.row(self._telemetry.event("evaluation put off", detail, level="warning", step=step))

    def _evaluator_state(self) -> str:
        self._move_heartbeats()
        beat = self._beats.get("evaluator")
        if beat is None:
            return "the evaluator has not started: has Ray room for eval.num_cpus and eval.num_gpus?"
        return f"the evaluator was last seen {beat.state!r}; its log: logs/evaluator.log in the run directory"

    def _latest(self, kind: str) -> WeightsAnnouncement:
        announced = self._queue.latest(kind)
        if announced is None:
            raise PartFailed(f"the learner ended without announcing {kind} weights")
        return announced
