"""The run page as an application of a real Ray Serve, behind a prefix.

Named to come before test_reward_servers.py, which leaves behind an application that has no place: a Serve
with one of those does not end before its Ray does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from ray import serve

from reward_servers.launch import LOOPBACK, start_serve, stop_rewards
from services.run_directory import RunDirectory
from services.ui.serve_app import build
from tests.unit.services.ui.made_runs import TOKEN, a_run, append, keep_group, update

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local")]

VARIABLE = "DGPO_TEST_UI_TOKEN"
# Ray's workers inherit the environment of the moment in which Ray starts.
os.environ[VARIABLE] = TOKEN
DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = a_run(tmp_path_factory.mktemp("runs"))
    append(run, map(update, range(1, 4)))
    keep_group(run, 1, 8, [0.1, 0.9])
    return run


@pytest.fixture(scope="module")
def address(ray_local: None, run: RunDirectory) -> Iterator[str]:
    try:
        base = start_serve(LOOPBACK, 0, deadline_s=DEADLINE_S, request_timeout_s=DEADLINE_S)
        serve.run(build({"run_dir": str(run.root), "token_env": VARIABLE}), name="page", route_prefix="/page")
        yield f"{base}/page"
    finally:
        serve.delete("page")
        stop_rewards()


def test_the_page_is_served_behind_its_prefix(address: str, run: RunDirectory) -> None:
    assert httpx.get(f"{address}/", timeout=DEADLINE_S).status_code == 401
    elsewhere = httpx.get(f"{address}/", headers={"host": "evil.example"}, timeout=DEADLINE_S)
    assert elsewhere.status_code == 421
    with httpx.Client(follow_redirects=True, timeout=DEADLINE_S) as client:
        page = client.get(address, params={"token": TOKEN})
        assert page.status_code == 200
        assert str(page.url) == f"{address}/"
        assert run.name in page.text
        assert client.get(page.url.join("static/page.js")).status_code == 200
        assert client.get(page.url.join("api/groups")).json()["total"] == 1
        assert client.get(page.url.join("api/groups/1-000008/0")).content.startswith(b"\x89PNG")
        assert _next(client, page.url.join("api/stream"), "reset") is not None


def _next(client: httpx.Client, url: Any, kind: str) -> str:
    with client.stream("GET", url) as answer:
        for line in answer.iter_lines():
            if line == f"event: {kind}":
                return line
    raise AssertionError("the stream has ended")


def test_new_rows_come_through_serve(address: str, run: RunDirectory) -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    with (
        httpx.Client(headers=headers, timeout=DEADLINE_S) as client,
        client.stream("GET", f"{address}/api/stream") as answer,
    ):
        lines = answer.iter_lines()
        while next(lines) != "event: reset":
            pass
        append(run, [update(4)])
        while next(lines) != "event: rows":
            pass
        assert '"step": [4]' in next(lines)


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        build({"run_dir": str(tmp_path), "token_env": VARIABLE, "token": "a secret"})
