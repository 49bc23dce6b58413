"""`dgpo reward`, as a user runs it: a server in a process of its own, and what is asked of it."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import trustme
from PIL import Image
from tls_proxy import certificate, written

from quickstart.render import render
from quickstart.words import prompt_of
from reward_servers.client import RewardClient
from reward_servers.server_config import read_token

pytestmark = [pytest.mark.integration, pytest.mark.timeout(420)]

DGPO = [sys.executable, "-m", "services.cli", "reward"]
WORDS = ("K7QX", "MOON")
DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where images lie, and the settings of a user."""
    folder = tmp_path_factory.mktemp("home")
    rng = random.Random(1)
    for word in WORDS:
        Image.fromarray(render(word, rng)).save(folder / f"{word}.png")
    Image.fromarray(render("MOON", rng)).resize((96, 48)).save(folder / "other-size.png")
    return folder


def dgpo(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XDG_CONFIG_HOME": str(home / "config")}
    return subprocess.run(
        [*DGPO, *arguments],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@dataclass
class Running:
    process: subprocess.Popen[str]
    url: str
    token_file: Path

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)


def started(home: Path, *arguments: str) -> Running:
    process = subprocess.Popen(
        [*DGPO, "serve", *arguments, "--port", "0", "--json"],
        env=os.environ | {"XDG_CONFIG_HOME": str(home / "config")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    said = json.loads(process.stdout.readline())
    return Running(process, said["url"], Path(said["token_file"]))


@pytest.fixture(scope="module")
def ocr(home: Path) -> Iterator[Running]:
    running = started(home, "ocr")
    yield running
    running.process.kill()
    running.process.wait(DEADLINE_S)


def test_a_server_without_a_token_makes_one_that_only_its_owner_reads(home: Path, ocr: Running) -> None:
    assert ocr.token_file == home / "config" / "dgpo" / "reward-token"
    assert stat.S_IMODE(ocr.token_file.stat().st_mode) == 0o600
    assert ocr.url.startswith("http://127.0.0.1:")
    refused = httpx.get(ocr.url + "/v1/info", trust_env=False)
    assert refused.status_code == 401


def test_here_and_by_a_server_the_scores_are_the_same(home: Path, ocr: Running) -> None:
    asked = ["K7QX.png", "MOON.png", "other-size.png", "--prompt", prompt_of("MOON"), "--json"]
    here = result_of(dgpo(home, "score", *asked, "--app", "ocr"))
    there = result_of(dgpo(home, "score", *asked, "--url", ocr.url))
    assert here["scores"] == there["scores"]
    assert here["details"] == there["details"]
    assert (here["model"], here["version"]) == (there["model"], there["version"])
    assert here["scores"][:2] == [0.0, 1.0] and here["errors"] == []
    assert here["images"] == asked[:3]


def test_a_server_that_refuses_makes_it_fail(home: Path, ocr: Running) -> None:
    done = dgpo(home, "score", "MOON.png", "--prompt", "no quotes", "--url", ocr.url)
    assert done.returncode == 1
    assert "422 unprocessable" in done.stderr and "double quotes" in done.stderr


def test_over_https_it_scores_whom_it_is_told_to_trust(home: Path, tmp_path: Path) -> None:
    signs = trustme.CA()
    shown, trusted = certificate(signs, tmp_path, "127.0.0.1"), written(signs, tmp_path)
    running = started(home, "jpeg", "--tls-cert", str(shown.chain), "--tls-key", str(shown.key))
    try:
        assert running.url.startswith("https://127.0.0.1:")
        asked = ["score", "MOON.png", "--prompt", "p", "--url", running.url, "--wait", "--deadline", "3600"]
        assert result_of(dgpo(home, *asked, "--tls-ca", str(trusted), "--json"))["errors"] == []
        refused = dgpo(home, *asked)
    finally:
        assert running.stop() == 0
    assert refused.returncode == 1
    assert f"at {running.url}: its certificate is signed by nobody who is trusted" in refused.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_stopped_answers_what_it_has_admitted(home: Path, number: int) -> None:
    running = started(
        home, "benchmarks.timed_scorer:create", "--args", '{"image_s": 1}', "--max-pending", "1"
    )
    client = RewardClient("timed", running.url, read_token(running.token_file), DEADLINE_S)
    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(client.score, np.zeros((4, 2, 2, 3), np.uint8), "p")
            assert taken(running, asked.done)
            code = running.stop(number)
            answered = asked.result(DEADLINE_S)
    finally:
        client.close()
        running.process.kill()
    assert (answered.scores, answered.attempts) == ((0.0,) * 4, 1)
    assert code == 0


def taken(running: Running, ended: Any) -> bool:
    """Whether the server's one place is taken before `ended`: asked until it is."""
    headers = {
        "Authorization": f"Bearer {read_token(running.token_file)}",
        "Content-Type": "application/json",
    }
    pause = threading.Event()
    while not ended():
        # Not JSON: refused if there is a place to read it in.
        answer = httpx.post(running.url + "/v1/score", content=b"x", headers=headers, trust_env=False)
        if answer.status_code == 429:
            return True
        pause.wait(0.01)
    return False


@pytest.mark.slow
def test_the_bench_finds_nothing_lost(home: Path) -> None:
    """A short overload and the bodies; what they take is for a quiet machine to say."""
    found = result_of(dgpo(home, "bench", "overload", "bodies", "--requests", "300", "--json"))
    overload = found["overload"]
    assert overload["scored"] + overload["shed"] == overload["requests"] == 300
    assert (overload["lost"], overload["wrong"], overload["scored_unanswered"]) == (0, 0, 0)
    assert overload["came_back_scored_once"] == overload["came_back"]
    words, photographs = found["bodies"]["rows"].values()
    assert photographs["safetensors"]["bytes"] > words["safetensors"]["bytes"] > 16 * 32 * 64 * 3
    assert set(words["json"]) == {"bytes", "encode_s", "decode_s", "answered_s"}


@pytest.mark.slow
def test_the_bench_measures_ocr_alone_and_on_serve(home: Path) -> None:
    """One short pass of each, on a Ray of its own: that it measures, not what."""
    found = result_of(dgpo(home, "bench", "throughput", "--passes", "1", "--seconds", "3", "--json"))
    throughput = found["throughput"]
    assert set(throughput["rows"]) == {"uvicorn", "Ray Serve"}
    for row in throughput["rows"].values():
        assert min(row["direct_images_s"], row["served_images_s"], row["p50_s"]) > 0
        assert row["ratio_min"] == row["ratio"] == row["ratio_max"]
        assert row["met"] is (row["ratio"] >= row["target"])
