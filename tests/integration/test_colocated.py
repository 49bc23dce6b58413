"""A whole run whose parts take turns on one card: never two at once, whoever dies, and the same weights."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from itertools import pairwise

import pytest
from small_runs import STEPS, Watching, run

from services.card import TURN
from services.config import Config
from services.messages import Heartbeat

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(900)]

LINE = re.compile(re.escape(TURN.partition(",")[0]).replace(re.escape("%.6f"), r"(\d+\.\d+)"))


def test_turns_do_not_overlap_and_a_killed_holder_loses_its_own(
    recipe: Callable[..., Config], digest: str
) -> None:
    killed: list[int] = []
    waited: set[str] = set()

    def kill_in_its_turn(beats: list[Heartbeat]) -> None:
        for beat in beats:
            if beat.state == "waiting for its turn":
                waited.add(beat.part.partition("-")[0])
            if beat.part == "rollout-0" and beat.state == "sampling" and not killed:
                killed.append(beat.pid)
                os.kill(beat.pid, signal.SIGKILL)

    view = Watching(at_beats=kill_in_its_turn)
    outcome = run(recipe("cluster.colocate=true", "rollout.workers=1"), view)
    assert killed and view.pids["rollout-0"] != killed[0]
    assert outcome.version.step == STEPS
    assert outcome.weights_digest == digest

    turns = []
    for log in outcome.run.logs.glob("*.log"):
        found = [(float(begin), float(end), log.stem) for begin, end in LINE.findall(log.read_text())]
        turns += found
    turns.sort()
    parts = [part for _, _, part in turns]
    assert parts.count("learner-0") == 1 + STEPS, "one to begin, one an update"
    assert parts.count("rollout-0") >= 1 + STEPS
    assert parts.count("evaluator") == 3, "to load, before and after"
    assert waited
    overlapping = [(one, next_) for one, next_ in pairwise(turns) if one[1] > next_[0]]
    assert overlapping == []
