"""Serve that does not start. What starts: tests/integration."""

from __future__ import annotations

import pytest
from ray.exceptions import RayError

from reward_servers import launch


@pytest.mark.parametrize("error", [RayError("no controller"), TimeoutError("HTTP proxies not available")])
def test_a_serve_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def start(**_: object) -> None:
        raise error

    monkeypatch.setattr(launch, "_owns_serve", False)
    monkeypatch.setattr(launch, "_running_options", lambda: None)
    monkeypatch.setattr("reward_servers.launch.serve.start", start)
    with pytest.raises(launch.RewardsNotReady, match=f"did not start on .*{error}"):
        launch.start_serve("127.0.0.1", 0, deadline_s=0, request_timeout_s=5)


def test_a_proxy_that_takes_longer_than_serve_waits_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def start(**options: object) -> None:
        calls.append(options)
        if len(calls) == 1:
            raise TimeoutError("HTTP proxies not available after 60s.")

    monkeypatch.setattr(launch, "_owns_serve", False)
    monkeypatch.setattr(launch, "_running_options", lambda: None)
    monkeypatch.setattr("reward_servers.launch.serve.start", start)
    assert launch.start_serve("127.0.0.1", 4711, deadline_s=60, request_timeout_s=5).endswith(":4711")
    assert len(calls) == 2


def test_a_port_that_is_taken_meanwhile_is_left_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    stopped: list[bool] = []

    def start(**options: object) -> None:
        port = options["http_options"].port  # type: ignore[attr-defined]
        tried.append(port)
        if len(tried) < 3:
            raise RayError(f"RuntimeError: Failed to bind to address '127.0.0.1:{port}'.")

    monkeypatch.setattr(launch, "_owns_serve", False)
    monkeypatch.setattr(launch, "_running_options", lambda: None)
    monkeypatch.setattr("reward_servers.launch.serve.start", start)
    monkeypatch.setattr("reward_servers.launch.serve.shutdown", lambda: stopped.append(True))
    url = launch.start_serve("127.0.0.1", 0, deadline_s=60, request_timeout_s=5)
    assert url.endswith(f":{tried[-1]}")
    assert (len(set(tried)), len(stopped)) == (3, 2)
    tried.clear()
    with pytest.raises(launch.RewardsNotReady, match=r"Failed to bind to address '127\.0\.0\.1:4711'"):
        launch.start_serve("127.0.0.1", 4711, deadline_s=60, request_timeout_s=5)
