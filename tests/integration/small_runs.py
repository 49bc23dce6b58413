"""Whole runs that take little, and a silent view of them that calls back at known moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.console import Console

from benchmarks import chaos
from services.config import Config
from services.driver import train
from services.messages import Heartbeat, PolicyVersion
from services.metrics import AnyRow, UpdateRow
from services.monitor import Outcome
from services.progress import Progress
from services.queue_types import RunState
from services.ray_metrics import RunMetrics
from services.run_directory import RunDirectory

STEPS = 4
TOKEN_VARIABLE = "DGPO_TEST_REWARD_TOKEN"

SMALL = (*chaos.SMALL, "telemetry.heartbeat_s=0.5")


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


def run(config: Config, view: Progress | None = None) -> Outcome:
    return train(config, RunDirectory.create(config), view or Watching())


class Heard(RunMetrics):
    """What a run tells Ray's metrics."""

    last: Heard

    def __init__(self, run: str, rewards: Iterable[str] = ()) -> None:
        self.rows: list[AnyRow] = []
        self.states: list[str] = []
        self.parts: set[str] = set()
        Heard.last = self
        super().__init__(run, rewards)

    def add(self, row: AnyRow) -> None:
        self.rows.append(row)
        super().add(row)

    def state(self, state: RunState) -> None:
        self.states.append(state)
        super().state(state)

    def beats(self, alive: Iterable[Heartbeat], newest: PolicyVersion | None) -> None:
        beats = list(alive)
        self.parts |= {beat.part for beat in beats}
        super().beats(beats, newest)
