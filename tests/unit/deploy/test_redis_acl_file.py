"""deploy/redis: its files as they are, the server that they make, and what doctor says of the logins."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from acl_server import FOLDER, USERS, AclServer, own_logins, rendered

from services.config_file import load_config
from services.doctor import examine
from services.queue_scripts import Name, _source

pytestmark = pytest.mark.integration


def test_the_server_has_the_settings_of_redis_conf(server: AclServer, run: str) -> None:
    with server.admin() as admin:
        said = admin.config_get("*")
    assert (said["maxmemory-policy"], said["appendonly"], said["save"]) == ("noeviction", "yes", "")
    assert said["enable-debug-command"] == said["enable-module-command"] == "no"
    assert said["bind"] == "127.0.0.1"


def test_doctor_takes_a_user_that_may_not_read_the_settings(
    server: AclServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DGPO_QUEUE_PASSWORD", server.passwords["run"])
    config = load_config(
        "quickstart", [f"queue.url={server.url('run')}", "queue.password_env=DGPO_QUEUE_PASSWORD"]
    )
    (finding,) = [found for found in examine(config) if found.what == "queue"]
    assert finding.ok, finding


def test_doctor_tries_every_login(server: AclServer, monkeypatch: pytest.MonkeyPatch) -> None:
    config = own_logins(server, monkeypatch)
    monkeypatch.setenv("DGPO_QUEUE_PASSWORD_LEARNER", server.passwords["worker"])
    monkeypatch.delenv("DGPO_QUEUE_PASSWORD_WORKER")
    found = {each.what: (each.ok, each.found) for each in examine(config) if each.what.startswith("queue")}
    assert found["queue driver"][0]
    assert not found["queue learner"][0] and "refused the login" in found["queue learner"][1]
    assert found["queue worker"] == (True, "DGPO_QUEUE_PASSWORD_WORKER is not set here: not tried")


def test_the_file_as_it_is_lets_nobody_in() -> None:
    lines = (FOLDER / "users.acl").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["default", *USERS]
    for line in lines:
        words = line.split()
        assert not any(
            word.startswith((">", "#", "+@", "allkeys", "~*")) or word == "nopass" for word in words
        )
        assert "reset" in words and all("{dgpo:*}:" in word for word in words if "~" in word)


def test_run_may_do_what_the_parts_may_and_nothing_else() -> None:
    """`run` is the union of the other four, grant by grant."""
    grants = {}
    for line in (FOLDER / "users.acl").read_text().splitlines():
        name = line.split()[1]
        grants[name] = set(re.findall(r"\([^)]*\)", line)) | set(re.sub(r"\([^)]*\)", "", line).split()[2:])
    parts = set().union(*(grants[part] for part in ("worker", "learner", "driver", "observer")))
    assert grants["run"] == parts


def test_every_command_of_the_scripts_is_granted_to_somebody() -> None:
    granted = {c.partition("|")[0] for c in re.findall(r"\+([a-z|]+)", (FOLDER / "users.acl").read_text())}
    called = set()
    for name in get_args(Name):
        called |= {word.lower() for word in re.findall(r"redis\.call\('([A-Z]+)'", _source(name)[0])}
    assert called <= granted, f"a script calls what no user of users.acl may: {called - granted}"


def test_acl_sh_refuses_what_would_be_a_mistake() -> None:
    nobody = rendered({})
    assert nobody.returncode == 2 and "no password was given" in nobody.stderr
    short = rendered({"DGPO_QUEUE_PASSWORD_WORKER": "short"})
    assert short.returncode == 2 and "DGPO_QUEUE_PASSWORD_WORKER" in short.stderr
    one = rendered({"DGPO_QUEUE_PASSWORD": "x" * 32})
    assert one.returncode == 0 and "x" * 32 not in one.stdout
    with_hash = [line.split()[1] for line in one.stdout.splitlines() if " #" in line]
    assert with_hash == ["run"], "DGPO_QUEUE_PASSWORD is that of the one login for all parts"
