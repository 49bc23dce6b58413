"""Keeps the rollout workers of a run alive, or the feeder that stands for them, within a budget.

Promises
- A worker that dies is made anew after a pause that doubles each time; `on_death` lets what it held be issued
  again at once.
- A worker that dies more often than its budget ends the run with its last error; one that cannot even start,
  for a reason that no restart mends, does so at once. A worker that has been made anew keeps its budget: its
  new node may lack what the others have.
- A worker that returns has seen the end of the run, and is not made anew; or that it is one too many, and is
  made anew if it is wanted again by then.
- `resize` changes their number. Workers that are too many end by themselves, between two groups; their deaths
  end nothing, and those that have not begun are not waited for.

Knows Ray only through `ray.wait` and `ray.get`; how a worker is made is handed in.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

import ray

from policy.errors import PolicyError
from services.config_file import ConfigError

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
LASTING = (ConfigError, PolicyError)
"""What no restart mends: the configuration and the model stay as they are."""
DISMISSED = "dismissed"
"""What a worker returns that was one too many."""


class PartFailed(RuntimeError):
    """A part of the run kept failing; the text has its name, its last error and where its log is."""


@dataclass
class _Worker:
    index: int
    actor: Any
    done: Any
    restarts: int = 0
    restart_at: float | None = None
    last_error: str = ""
    lasting: bool = False
    killed: str = ""
    """Why, where the supervisor did it."""


@dataclass
class Supervisor:
    """Supervises `count` workers.

    Args:
        spawn: index -> (actor handle, reference to its endless `run` call).
        count: workers to keep.
        max_restarts: of one worker.
        on_death: told (part name, its error) when it is dead for certain.
        on_leave: told (part name) when a worker that is one too many is gone.
        part: what a worker is called, before its index.
    """

    spawn: Callable[[int], tuple[Any, Any]]
    count: int
    max_restarts: int
    on_death: Callable[[str, str], None]
    part: str = "rollout"
    on_leave: Callable[[str], None] = lambda part: None
    _workers: list[_Worker] = field(default_factory=list)

    def start(self) -> None:
        self._workers = [_Worker(index, *self.spawn(index)) for index in range(self.count)]

    def resize(self, count: int, begun: Container[str] = ()) -> None:
        """Keep this many from now on: those that are missing are made, those that are too many not again.

        Args:
            begun: parts that have been heard of; the others may wait for a place in the cluster for ever.
        """
        if count == self.count:
            return
        logger.info("%d workers wanted, %d before", count, self.count)
        self.count = count
        kept = {worker.index for worker in self._workers}
        for worker in self._workers:
            name = f"{self.part}-{worker.index}"
            if worker.index >= count:
                if worker.restart_at is not None or (worker.done is not None and name not in begun):
                    self._leave(worker, name)
            elif worker.done is None and worker.restart_at is None:
                worker.actor, worker.done = self.spawn(worker.index)
                worker.restarts = 0
        missing = [index for index in range(count) if index not in kept]
        self._workers += [_Worker(index, *self.spawn(index)) for index in missing]

    def poll(self, timeout_s: float) -> None:
        """See to dead workers; waits up to `timeout_s` for one to end.

        Raises:
            PartFailed: a worker's budget is spent.
        """
        alive = {worker.done: worker for worker in self._workers if worker.done is not None}
        if alive:
            ended, _ = ray.wait(list(alive), num_returns=1, timeout=timeout_s)
            for reference in ended:
                self._ended(alive[reference])
        else:
            time.sleep(timeout_s)
        for worker in self._workers:
            if worker.restart_at is not None and time.monotonic() >= worker.restart_at:
                worker.actor, worker.done = self.spawn(worker.index)
                worker.restart_at = None

    def end(self, part: str, why: str) -> None:
        """Kill a worker; it is made anew as if it had died of this."""
        for worker in self._workers:
            if f"{self.part}-{worker.index}" == part and worker.done is not None and not worker.killed:
                worker.killed = why
                ray.kill(worker.actor)

    def restarting(self) -> list[str]:
        """Workers that died and wait for their next life."""
        return [f"{self.part}-{one.index}" for one in self._workers if one.restart_at is not None]

    def join(self, deadline_s: float) -> None:
        """Wait for all workers to see the end of the run; those that do not are killed."""
        deadline = time.monotonic() + deadline_s
        references = [worker.done for worker in self._workers if worker.done is not None]
        if references:
            ray.wait(references, num_returns=len(references), timeout=max(0.0, deadline - time.monotonic()))
        for worker in self._workers:
            if worker.actor is not None:
                ray.kill(worker.actor)

    def _ended(self, worker: _Worker) -> None:
        name = f"{self.part}-{worker.index}"
        reference, worker.done = worker.done, None
        try:
            dismissed = ray.get(reference) == DISMISSED
        except ray.exceptions.RayError as error:
            worker.last_error, worker.killed = worker.killed or _last_line(error), ""
            worker.lasting = not worker.restarts and isinstance(getattr(error, "cause", None), LASTING)
        else:
            if not dismissed:
                logger.info("%s has ended with the run", name)
            elif worker.index >= self.count:
                self._leave(worker, name)
            else:
                ray.kill(worker.actor)
                worker.restart_at = time.monotonic()
            return
        ray.kill(worker.actor)
        self.on_death(name, worker.last_error)
        if worker.index >= self.count:
            self._leave(worker, name)
            return
        log = f"its log: logs/{name}.log in the run directory"
        if worker.lasting:
            raise PartFailed(f"{name} cannot work: {worker.last_error}; {log}")
        if worker.restarts >= self.max_restarts:
            raise PartFailed(
                f"{name} died {worker.restarts + 1} times (rollout.max_restarts {self.max_restarts}); "
                f"last error: {worker.last_error}; {log}"
            )
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**worker.restarts)
        worker.restarts += 1
        worker.restart_at = time.monotonic() + pause
        logger.warning("%s died (%s); made anew in %.0f s", name, worker.last_error, pause)

    def _leave(self, worker: _Worker, name: str) -> None:
        logger.info("%s was one too many, and is gone", name)
        # Its place in the cluster is another's now.
        ray.kill(worker.actor)
        worker.done = worker.restart_at = None
        self.on_leave(name)


def _last_line(error: Exception) -> str:
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {cause}"
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"
