"""A whole run whose parts take turns on one card: never two at once, whoever dies, and the same weights."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from small_runs import STEPS, Watching

from services.card import TURN
from services.config import Config
from services.driver import train
from services.embedded import EmbeddedValkey
from services.group_queue import connect
from services.messages import Heartbeat
from services.queue_scripts import Keys
from services.run_directory import RunDirectory

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(900)]

LINE = re.compile(re.escape(TURN.partition(",")[0]).replace(re.escape("%.6f"), r"(\d+\.\d+)"))


def test_turns_do_not_overlap_and_a_killed_holder_loses_its_own(
    recipe: Callable[..., Config], digest: str
) -> None:
    directory = RunDirectory.create(recipe("cluster.colocate=true", "rollout.workers=1"))
    waited: set[str] = set()
    trains, over = threading.Event(), threading.Event()

    def look(beats: list[Heartbeat]) -> None:
        waited.update(beat.part for beat in beats if beat.state == "waiting for its turn")

    view = Watching(at_beats=look, at_row=lambda row: trains.set())

    def kill_in_its_turn() -> tuple[int, float]:
        """The worker, once the run trains and it has the turn; and when."""
        while not trains.wait(0.1):
            assert not over.is_set()
        with connect(*EmbeddedValkey.join(directory.queue)) as client:
            key = Keys(directory.name).key("turn")
            while not (token := bytes(client.get(key) or b"")).startswith(b"rollout-0 "):
                assert not over.is_set()
            pid = view.pids["rollout-0"]
            os.kill(pid, signal.SIGKILL)
            killed_at = time.time()
            assert client.get(key) == token, "it was killed in its turn"
        return pid, killed_at

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_in_its_turn)
        try:
            outcome = train(directory.config(), directory, view)
        finally:
            over.set()
        pid, killed_at = killing.result()
    assert view.pids["rollout-0"] != pid
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
    assert not [turn for turn in turns if turn[0] < killed_at < turn[1]], "the killed one had the card alone"
    overlapping = [(one, next_) for one, next_ in pairwise(turns) if one[1] > next_[0]]
    assert overlapping == []
