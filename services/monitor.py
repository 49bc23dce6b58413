"""Watches a run until it ends: moves metrics to the run directory, orders evaluations, judges failures.

Promises
- A failure of any part ends `watch` with an exception that names it; the end of the work ends it normally.
- Nothing is waited for in silence: a part without a heartbeat is named, with what it was doing last.
- The evaluations before and after training always happen (where held-out prompts exist); those in between are
  skipped rather than queued up when the evaluator is behind.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from pydantic import TypeAdapter

from services.context import RunContext
from services.group_queue import GroupQueue, RunState
from services.memory import peak_memory
from services.messages import Heartbeat, PolicyVersion, WeightsAnnouncement
from services.metrics import AnyRow, EvalRow, MemoryRow
from services.progress import Progress
from services.prompts import prompt_source
from services.run_directory import RunDirectory
from services.stop_signals import StopSignals
from services.supervisor import PartFailed, Supervisor
from services.telemetry import Telemetry, read_metrics

logger = logging.getLogger(__name__)

POLL_S = 0.5
EVALUATION_DEADLINE_S = 1800.0
SILENT_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended; a failed one raises instead."""

    run: RunDirectory
    interrupted: bool
    version: PolicyVersion
    weights_digest: str
    """Of the policy (not the EMA) behind the last step."""
    seconds: float
    """From the start of the learner to its end, model loading included."""


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
    """Everything between the start and the end of a run; made and closed by the driver."""

    def __init__(
        self,
        context: RunContext,
        queue: GroupQueue,
        telemetry: Telemetry,
        view: Progress,
        evaluator: Any,
        supervisor: Supervisor,
        learner: LearnerThread,
        signals: StopSignals,
    ) -> None:
        self._context = context
        self._queue = queue
        self._telemetry = telemetry
        self._view = view
        self._evaluator = evaluator
        self._supervisor = supervisor
        self._learner = learner
        self._signals = signals
        self._rows: TypeAdapter[AnyRow] = TypeAdapter(AnyRow)
        self._last_row_id = "0-0"
        self._dead_seen = 0
        self._draining = False
        self._evaluating: Any = None
        self._evaluated: set[int] = {row.step for row in read_metrics(context.directory).evals}
        self._beats: dict[str, Heartbeat] = {}
        self._silent: set[str] = set()
        self._ending: RunState = "failed"
        source, settings = prompt_source(context.config), context.config.eval
        self._evaluates = bool(source.heldout(settings.seed, 1))

    def watch(self) -> Outcome:
        """Returns when the run is done or drained; raises when it failed."""
        started = time.monotonic()
        while self._learner.running():
            self._turn()
        self._turn()
        if self._learner.error is not None:
            raise PartFailed(
                f"the learner failed: {_reason(self._learner.error)}; its log: "
                f"{self._context.run_directory.logs / 'learner-0.log'}"
            ) from self._learner.error
        seconds = time.monotonic() - started
        policy = self._latest("policy")
        interrupted = self._draining and policy.version.step < self._context.config.learner.max_steps
        self._ending = "draining" if interrupted else "done"
        self._queue.set_state(self._ending)
        if not interrupted:
            self._final_evaluation()
        self._telemetry.write(MemoryRow(time=time.time(), parts=peak_memory(self._beats.values())))
        return Outcome(
            run=self._context.run_directory,
            interrupted=interrupted,
            version=policy.version,
            weights_digest=policy.digest,
            seconds=seconds,
        )

    def close(self) -> None:
        """Tell every part that the run is over."""
        try:
            self._queue.set_state(self._ending)
        except Exception:  # the run may be ending because the queue is gone: that error must not be hidden
            logger.warning("the parts could not be told that the run is %s", self._ending, exc_info=True)

    def _turn(self) -> None:
        if self._signals.requested.is_set() and not self._draining:
            self._draining = True
            self._view.activity("stopping: finishing the step and writing a checkpoint")
            self._queue.set_state("draining")
        self._supervisor.poll(POLL_S)
        self._move_metrics()
        self._watch_heartbeats()
        self._count_dead_letters()
        self._collect_evaluation(wait_s=0.0)
        self._order_evaluation()

    def _move_metrics(self) -> None:
        for row_id, row in self._queue.read_metrics(self._last_row_id):
            self._last_row_id = row_id
            self._write(self._rows.validate_python(row))

    def _write(self, row: AnyRow) -> None:
        self._telemetry.write(row)
        self._view.row(row)

    def _watch_heartbeats(self) -> None:
        alive = self._move_heartbeats()
        silent = set(self._beats) - set(alive)
        for part in silent - self._silent:
            last = self._beats[part]
            detail = f"{part}: last seen {last.state!r} since {time.time() - last.since:.0f} s"
            self._view.row(self._telemetry.event("no heartbeat", detail, level="warning"))
        self._silent = silent

    def _move_heartbeats(self) -> dict[str, Heartbeat]:
        alive = {part: beat for part, beat in self._queue.heartbeats().items() if beat is not None}
        self._view.heartbeats(list(alive.values()))
        self._beats |= alive
        return alive

    def _count_dead_letters(self) -> None:
        letters = self._queue.dead_letters()
        for letter in letters[self._dead_seen :]:
            self._view.row(
                self._telemetry.event("dead letter", letter.reason, level="warning", ordinal=letter.ordinal)
            )
        self._dead_seen = len(letters)
        if len(letters) > self._context.config.queue.max_dead:
            raise PartFailed(
                f"{len(letters)} ordinals were given up (queue.max_dead "
                f"{self._context.config.queue.max_dead}); the last one, {letters[-1].ordinal}, because: "
                f"{letters[-1].reason}"
            )

    def _order_evaluation(self) -> None:
        if not self._evaluates or self._evaluating is not None:
            return
        announced = self._queue.latest("ema")
        if announced is not None and announced.version.step not in self._evaluated:
            self._evaluate(announced)

    def _evaluate(self, announced: WeightsAnnouncement) -> None:
        step = announced.version.step
        self._evaluated.add(step)
        last = self._context.config.learner.max_steps
        when = "before" if step == 0 else "after" if step == last else "during"
        self._evaluating = self._evaluator.evaluate.remote(announced.model_dump_json(), when)

    def _collect_evaluation(self, *, wait_s: float) -> None:
        if self._evaluating is None:
            return
        ready, _ = ray.wait([self._evaluating], timeout=wait_s)
        if not ready:
            return
        self._evaluating = None
        try:
            row = ray.get(ready[0])
        except ray.exceptions.RayError as error:
            raise PartFailed(f"the evaluator failed: {_reason(error)}") from error
        if row is not None:
            self._write(EvalRow.model_validate_json(row))

    def _final_evaluation(self) -> None:
        if not self._evaluates:
            return
        self._view.activity("evaluating the trained model on held-out prompts")
        deadline = time.monotonic() + EVALUATION_DEADLINE_S
        announced = self._latest("ema")
        while self._evaluating is not None or announced.version.step not in self._evaluated:
            if self._evaluating is None:
                self._evaluate(announced)
            self._collect_evaluation(wait_s=POLL_S)
            self._move_heartbeats()
            if time.monotonic() > deadline:
                raise PartFailed(f"the evaluator did not end within {EVALUATION_DEADLINE_S:.0f} s")

    def _latest(self, kind: str) -> WeightsAnnouncement:
        announced = self._queue.latest(kind)
        if announced is None:
            raise PartFailed(f"the learner ended without announcing {kind} weights")
        return announced


def _reason(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error.__cause__ or error
    lines = [line.strip() for line in str(cause).strip().splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else 'no message'}"
