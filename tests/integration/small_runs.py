"""Whole runs that take little, and a silent view of them that calls back at known moments."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from services.messages import Heartbeat
from services.metrics import UpdateRow
from services.progress import Progress

SMALL = (
    "rollout.group_size=4",
    "rollout.steps=4",
    "rollout.num_cpus=0.1",
    "objective.timesteps.first=4",
    "objective.timesteps.skip=0",
    "learner.micro_batch=4",
    "learner.num_cpus=0.1",
    "queue.max_staleness=0",
    "checkpoint.every_steps=2",
    "telemetry.tensorboard=false",
    "telemetry.heartbeat_s=0.5",
)
"""Overrides of a recipe: reproducible, and over in seconds an update."""


class Watching(Progress):
    """Calls back behind each update and each round of heartbeats, and knows the processes of the parts."""

    def __init__(
        self,
        *,
        at_row: Callable[[UpdateRow], None] = lambda row: None,
        at_beats: Callable[[list[Heartbeat]], None] = lambda beats: None,
    ) -> None:
        super().__init__("test", 1, console=Console(stderr=True), quiet=True)
        self._at_row, self._at_beats = at_row, at_beats
        self.pids: dict[str, int] = {}

    def update_row(self, row: UpdateRow) -> None:
        super().update_row(row)
        self._at_row(row)

    def heartbeats(self, beats: list[Heartbeat]) -> None:  # type: ignore[override]
        super().heartbeats(beats)
        self.pids |= {beat.part: beat.pid for beat in beats}
        self._at_beats(beats)
