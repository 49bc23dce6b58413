"""The parts of `dgpo reward bench` that need Ray Serve, short: what they do, not how fast."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks import reward_scaling, reward_servers
from reward_servers.launch import LOOPBACK, start_serve, stop_rewards

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local")]

# Ray's workers inherit the environment of the moment in which Ray starts.
os.environ.setdefault(reward_servers.TOKEN_ENV, "a-token-for-tests-only")


@pytest.mark.slow
def test_replicas_follow_the_load_and_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def on_the_ray_of_the_tests(cpus: int) -> Iterator[str]:
        deadline_s = reward_servers.DEADLINE_S
        try:
            yield start_serve(LOOPBACK, 0, deadline_s=deadline_s, request_timeout_s=deadline_s)
        finally:
            stop_rewards()

    monkeypatch.setattr(reward_scaling, "ray_serve", on_the_ray_of_the_tests)
    found = reward_scaling.scaling(2, 0.05, 1.0)
    assert found["replicas"] == 2
    assert min(found["most_images_s"], found["one_images_s"]) > 0
    assert found["up_s"] > 0 and found["down_s"] > 0
