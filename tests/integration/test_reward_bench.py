"""The parts of `dgpo reward bench` that need Ray Serve, short: what they do, not how fast."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console

from benchmarks import reward_division, reward_proxy, reward_scaling, reward_servers
from benchmarks.reward_tables import print_tables
from reward_servers.launch import LOOPBACK, start_serve, stop_rewards

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local")]

# Ray's workers inherit the environment of the moment in which Ray starts.
os.environ.setdefault(reward_servers.TOKEN_ENV, "a-token-for-tests-only")


@pytest.fixture(autouse=True)
def _on_the_ray_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def ray_serve(cpus: int) -> Iterator[str]:
        deadline_s = reward_servers.DEADLINE_S
        try:
            yield start_serve(LOOPBACK, 0, deadline_s=deadline_s, request_timeout_s=deadline_s)
        finally:
            stop_rewards()

    for part in (reward_division, reward_proxy, reward_scaling):
        monkeypatch.setattr(part, "ray_serve", ray_serve)


@pytest.mark.slow
def test_replicas_follow_the_load_and_go_back() -> None:
    found = reward_scaling.scaling(2, 0.05, 1.0)
    assert found["replicas"] == 2
    assert min(found["most_images_s"], found["one_images_s"]) > 0
    assert found["up_s"] > 0 and found["down_s"] > 0


@pytest.mark.slow
def test_a_group_is_divided_by_each_router() -> None:
    found = reward_division.division(2, 0.02, 1)
    asked = {(row["router"], row["slow"], row["workers"], row["images_per_request"]) for row in found["rows"]}
    sizes = reward_division.SIZES
    assert asked == {
        (router, slow, workers, size)
        for router in reward_division.ROUTERS
        for slow, workers in ((False, 1), (False, 2), (True, 2))
        for size in sizes
    }
    assert len(asked) == len(found["rows"])
    # A request waits for its images at least, whoever routes it.
    assert all(row["mean_s"] >= 0.02 * (row["images_per_request"] or 24) for row in found["rows"])
    shown = Console(record=True, width=120, file=io.StringIO())
    print_tables({"division": found}, shown)
    assert shown.export_text().count("one half as fast") == len(sizes)


@pytest.mark.slow
def test_bytes_go_through_the_proxy_and_past_it() -> None:
    found = reward_proxy.proxy(1, 2.0)
    assert all(row["min"] == row["max"] == row["bytes_s"] > 0 for row in found["rows"].values())
    shown = Console(record=True, width=120, file=io.StringIO())
    print_tables({"proxy": found}, shown)
    text = shown.export_text()
    assert "its proxy" in text and "uvicorn" in text
