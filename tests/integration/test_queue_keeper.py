"""The embedded queue server of a run: started again when it dies, within a budget, and ended with its run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services.embedded import EmbeddedServerError
from services.group_queue import connect
from services.queue_keeper import QueueKeeper

pytestmark = pytest.mark.integration

DEADLINE_S = 30.0


def eventually(true: Callable[[], object]) -> None:
    give_up = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_a_server_that_dies_is_started_again_with_what_it_had(tmp_path: Path) -> None:
    with QueueKeeper(tmp_path, max_restarts=1) as keeper:
        url, first = keeper.server.url, keeper.server.pid
        client = connect(url, keeper.server.password)
        client.set("kept", 1)
        assert client.execute_command("WAITAOF", 1, 0, 10_000)[0] == 1
        keeper.server.kill()
        # Over the same connection, which asks again by itself.
        assert client.get("kept") == b"1"
        assert keeper.server.pid not in (first, None)
        assert (keeper.server.url, keeper.problem) == (url, None)
        eventually(lambda: list(keeper.news()) == [f"it was started again at {url}; 0 restarts are left"])
        keeper.server.kill()
        eventually(lambda: keeper.problem)
        assert keeper.problem == "it has died too often" and not keeper.server.alive
        client.close()


def test_it_ends_with_the_block(tmp_path: Path) -> None:
    with QueueKeeper(tmp_path) as keeper:
        pid = keeper.server.pid
        assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert list(keeper.news()) == []


def test_a_server_that_cannot_be_started_is_an_error_of_the_block(tmp_path: Path) -> None:
    with (
        QueueKeeper(tmp_path),
        pytest.raises(EmbeddedServerError, match="another queue server is using"),
    ):
        other = QueueKeeper(tmp_path)
        other.server.start_deadline_s = 0.2
        with other:
            raise AssertionError("two servers share a directory")


def test_one_that_cannot_be_started_again_says_why(tmp_path: Path) -> None:
    with QueueKeeper(tmp_path) as keeper:
        # A file that no server reads.
        (tmp_path / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense")
        keeper.server.kill()
        eventually(lambda: keeper.problem)
        assert "it could not be started again" in (keeper.problem or "")
