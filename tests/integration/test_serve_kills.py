"""Parts of Serve are killed under load: no request is lost, none gets another's score, scores flow again."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from benchmarks.timed_scorer import TIMED
from reward_servers.client import RewardClient
from reward_servers.launch import start_rewards, stop_rewards
from services.config import RewardConfig

pytestmark = [
    *(pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)),
    pytest.mark.usefixtures("ray_local"),
]

TOKEN = "a-token-for-tests-only"
DEADLINE_S = 240.0
CLIENTS = 4


class Load:
    """Clients that ask without a pause; each image has a score of its own."""

    def __init__(self, url: str) -> None:
        self.scored = 0
        self.failed: list[str] = []
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(CLIENTS)]

    def _ask(self, number: int) -> None:
        client = RewardClient("timed", self._url, TOKEN, DEADLINE_S, app=TIMED)
        asked = 0
        while not self._stop.is_set():
            shade = (number * 61 + asked) % 256
            try:
                scores = client.score(np.full((1, 2, 2, 3), shade, np.uint8), "p").scores
                if scores != (float(shade),):
                    self.failed.append(f"{scores} for {shade}")
            except Exception as error:
                self.failed.append(repr(error))
            asked += 1
            self.scored += 1
        client.close()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)


@pytest.fixture(scope="module")
def url(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    file = tmp_path_factory.mktemp("rewards") / "token"
    file.touch(0o600)
    file.write_text(TOKEN)
    timed = RewardConfig(name="timed", app=TIMED, args={"image_s": 0.02}, num_cpus=0.1, replicas=2)
    yield start_rewards([timed], token_file=file, port=0, deadline_s=DEADLINE_S)["timed"]
    stop_rewards()


def ours(word: str, count: int) -> list[psutil.Process]:
    """Processes of this test's Ray whose name has the word in it, once there are so many."""
    give_up = time.monotonic() + DEADLINE_S
    while True:
        found = []
        for child in psutil.Process().children(recursive=True):
            try:
                if word in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.Error:
                continue
        if len(found) >= count:
            return found[:count]
        assert time.monotonic() < give_up, f"no {count} of {word}, which Serve makes anew"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("parts", "count"),
    [
        (("ServeReplica:",), 1),
        (("ServeReplica:",), 2),
        (("ProxyActor",), 1),
        (("ServeController",), 1),
        (("ProxyActor", "ServeController"), 1),
    ],
    ids=["a replica", "all replicas", "the proxy", "the controller", "proxy and controller"],
)
def test_what_is_killed_costs_time_and_no_score(url: str, parts: tuple[str, ...], count: int) -> None:
    with Load(url) as load:
        until_scores(load)
        for victim in [victim for part in parts for victim in ours(part, count)]:
            victim.send_signal(signal.SIGKILL)
        until_scores(load)
    assert load.failed == []


def until_scores(load: Load) -> None:
    """Until all clients have been answered more than once."""
    wanted, give_up = load.scored + 5 * CLIENTS, time.monotonic() + DEADLINE_S
    while load.scored < wanted:
        assert time.monotonic() < give_up, f"{load.scored} of {wanted}; {load.failed[-3:]}"
        time.sleep(0.05)
