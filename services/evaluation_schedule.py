"""When the EMA weights of a run are evaluated: orders evaluations from the evaluator and collects them.

Promises
- The evaluations before and after training happen wherever held-out prompts exist. Those in between happen
  every `eval.every_steps`, and are skipped rather than queued up when the evaluator is behind.
- Weights that died with their publisher are an event, and their evaluation waits for the next announcement;
  a learner that starts anew from step 0 announces the same weights again.
- The evaluation after training ends within `eval.deadline_s`, or `PartFailed` says what the evaluator was at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import ray

from services.config import Config
from services.formatting import reason
from services.messages import PolicyVersion, WeightsAnnouncement
from services.metrics import EvalRow, When
from services.prompts import evaluates
from services.supervisor import PartFailed

POLL_S = 0.5
RETRY_S = 5.0
"""A shared file system may show the final checkpoint to another machine a little later."""


class EvaluationSchedule:
    """The evaluations of one run, one at a time.

    Args:
        evaluator: handle of the Evaluator actor; None where the run evaluates nothing.
        evaluated: steps whose evaluation an earlier driver of the run has recorded, and when it was.
        on_row: told what an evaluation found.
        on_gone: told which weights nobody has any more, once for each announcement.
    """

    def __init__(
        self,
        config: Config,
        evaluator: Any,
        evaluated: Iterable[tuple[int, When]],
        *,
        on_row: Callable[[EvalRow], None],
        on_gone: Callable[[WeightsAnnouncement, When], None],
    ) -> None:
        self._config = config
        self._evaluator = evaluator
        self._evaluated = set(evaluated)
        self._on_row = on_row
        self._on_gone = on_gone
        self.possible = evaluator is not None and evaluates(config)
        """There is somebody to evaluate, and there are held-out prompts."""
        self._running: tuple[WeightsAnnouncement, Any] | None = None
        self._gone: PolicyVersion | None = None

    def poll(self, announced: WeightsAnnouncement | None) -> None:
        """Collect an evaluation that has ended, then order that of `announced` (the newest) if it is due."""
        self._collect(wait_s=0.0)
        if announced is None or self._running is not None or announced.version == self._gone:
            return
        if self._due(announced.version.step):
            self._order(announced)

    def finish(self, announced: WeightsAnnouncement, evaluator_state: Callable[[], str]) -> None:
        """Wait until the weights behind the last step are evaluated; only where that is `possible`.

        Args:
            evaluator_state: what the evaluator is doing, asked at every turn.

        Raises:
            PartFailed: the evaluator failed, or is not done within `eval.deadline_s`.
        """
        within_s = self._config.eval.deadline_s
        deadline = time.monotonic() + within_s
        while self._running is not None or not self._is_evaluated(announced.version.step):
            if self._running is None:
                if announced.version == self._gone:
                    time.sleep(RETRY_S)
                self._order(announced)
            self._collect(wait_s=POLL_S)
            state = evaluator_state()
            if announced.version == self._gone:
                state = f"neither a process nor the final checkpoint has the weights {announced.version}"
            if time.monotonic() > deadline:
                raise PartFailed(
                    f"the evaluation of step {announced.version.step} did not end within {within_s:g} s "
                    f"(eval.deadline_s): {state}"
                )

    def _due(self, step: int) -> bool:
        if not self.possible or self._is_evaluated(step):
            return False
        every = self._config.eval.every_steps
        return self._when(step) != "during" or (every > 0 and step % every == 0)

    def _is_evaluated(self, step: int) -> bool:
        """The one after training has more prompts than one during it, and is not left out for that one."""
        done = {when for at, when in self._evaluated if at == step}
        return self._when(step) in done if self._when(step) == "after" else bool(done)

    def _when(self, step: int) -> When:
        return "before" if step == 0 else "after" if step == self._config.learner.max_steps else "during"

    def _order(self, announced: WeightsAnnouncement) -> None:
        when = self._when(announced.version.step)
        self._running = announced, self._evaluator.evaluate.remote(announced.model_dump_json(), when)

    def _collect(self, *, wait_s: float) -> None:
        if self._running is None:
            return
        announced, running = self._running
        ready, _ = ray.wait([running], timeout=wait_s)
        if not ready:
            return
        self._running = None
        try:
            row = ray.get(running)
        except ray.exceptions.RayError as error:
            raise PartFailed(f"the evaluator failed: {reason(error)}") from error
        if row is not None:
            self._evaluated.add((announced.version.step, self._when(announced.version.step)))
            self._on_row(EvalRow.model_validate_json(row))
        elif announced.version != self._gone:
            self._gone = announced.version
            self._on_gone(announced, self._when(announced.version.step))
