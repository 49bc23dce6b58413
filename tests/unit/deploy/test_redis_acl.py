"""deploy/redis: each user can do all that its part of the code does, and what is another's is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
import redis
import torch
from acl_server import FOLDER, USERS, AclServer, rendered

from services.codec import EncodedGroup, encode_group
from services.config import Config, QueueConfig
from services.config_file import PROJECT_ROOT, load_config
from services.context import RunContext
from services.doctor import examine
from services.group_queue import Admitted, Failed, GroupQueue, Lease, QueueUnreachable, connect
from services.messages import GroupHeader, Heartbeat, PolicyVersion, Prompt, WeightsAnnouncement
from services.queue_scripts import Keys, Name, Scripts, _source
from services.queue_worker import INLINE_BYTES

pytestmark = pytest.mark.integration
CONFIG = QueueConfig(max_staleness=0, max_attempts=2)
LIMIT = 8
WINDOW = 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AclServer]:
    with AclServer(tmp_path_factory.mktemp("acl")) as started:
        yield started


@pytest.fixture
def run() -> str:
    return f"acl-{uuid.uuid4().hex[:12]}"


def queue(server: AclServer, user: str, run: str) -> GroupQueue:
    """As services/context.py opens it."""
    return GroupQueue(connect(server.url(user), server.passwords[user]), run, CONFIG)


def weights(at: PolicyVersion, kind: str = "policy") -> WeightsAnnouncement:
    return WeightsAnnouncement.model_validate(
        {"version": at, "kind": kind, "digest": f"digest of {at}", "tensors": 1, "bytes": 4}
    )


def group(run: str, lease: Lease, *, large: bool = False) -> EncodedGroup:
    header = GroupHeader(
        run=run,
        ordinal=lease.ordinal,
        attempt=lease.attempt,
        version=lease.version,
        prompt=Prompt(text="a sign"),
        seeds=(0, 1),
        rewards={"ocr": (0.0, 1.0)},
        worker="rollout-0",
        sample_s=0.0,
        reward_s=0.0,
    )
    return encode_group(header, {"latents": torch.zeros(2, INLINE_BYTES if large else 4)})


def beat(part: str) -> Heartbeat:
    return Heartbeat(
        part=part,
        state="sampling",
        since=0.0,
        version=None,
        ordinal=None,
        groups=0,
        rss_bytes=1,
        pid=1,
        node="n",
    )


def whole_run(server: AclServer, run: str, opened: Callable[[str], GroupQueue]) -> None:
    """Everything that worker, learner, driver and observer do with the queue, each with its login."""
    worker, learner, driver, observer = map(opened, ("worker", "learner", "driver", "observer"))
    driver.set_state("starting")
    assert driver.last_written_metrics() == "0-0"
    assert worker.issue("rollout-0") is None and not worker.wait_for_work(0.01)
    version = learner.begin_epoch(weights, limit=LIMIT, window=WINDOW)
    learner.announce(weights(version, "ema"))
    learner.plan({ordinal: ordinal + 1 for ordinal in range(WINDOW)})
    driver.set_state("running")

    leases = [lease for _ in range(WINDOW) if (lease := worker.issue("rollout-0"))]
    assert [lease.ordinal for lease in leases] == [0, 1, 2, 3]
    assert worker.place_of(leases[0]) == 1
    assert worker.renew("rollout-0", 0) and worker.release("rollout-0", 3)
    worker.beat(beat("rollout-0"))
    learner.beat(beat("learner-0"))
    latest = worker.latest("policy")
    assert latest is not None and latest.version == version
    assert worker.state() == "running"
    assert worker.fail("rollout-0", 2, "no luck") is Failed.RETRY
    assert worker.admit(group(run, leases[0])) is Admitted.OK
    assert worker.admit(group(run, leases[1], large=True)) is Admitted.OK
    assert worker.admit(group(run, leases[1], large=True)) is Admitted.DUP
    again = worker.issue("rollout-0")
    assert again is not None and worker.fail("rollout-0", again.ordinal, "no luck again") is Failed.DEAD

    taken = learner.take(2, deadline_s=10)
    assert [found.header.ordinal for found in taken] == [0, 1]
    learner.frontier()
    learner.frontier_after([0, 1])
    learner.status()
    learner.commit(weights(PolicyVersion(epoch=0, step=1)), [0, 1])
    learner.append_metrics({"step": 1})

    held = worker.issue("rollout-1")
    assert held is not None
    driver.release_worker("rollout-1", "it died")
    driver.want_workers(3)
    assert worker.wanted_workers() == 3
    worker.beat(beat("rollout-9"))
    driver.forget("rollout-9")
    ((row, _),) = driver.read_metrics(driver.last_written_metrics())
    driver.metrics_written(row)
    ema = driver.latest("ema")
    assert ema is not None
    assert set(driver.heartbeats()) == {"rollout-0", "learner-0"}
    assert [letter.reason for letter in driver.dead_letters()] == ["no luck again"]

    # A stale group is refused by the learner, and an entry that nobody admitted is thrown away.
    kept = worker.issue("rollout-0")
    assert kept is not None and worker.admit(group(run, kept, large=True)) is Admitted.OK
    with server.admin() as admin:
        admin.xadd(Keys(run).groups, {"ordinal": 77, "group": b"?"})
    second = opened("learner")
    frontier = learner.frontier()
    version = second.begin_epoch(
        weights, limit=LIMIT, window=WINDOW, checkpoint=PolicyVersion(epoch=0, step=1), frontier=frontier
    )
    assert [found.header.ordinal for found in second.take(1, deadline_s=10)] == [kept.ordinal]
    # Back to before the first step: what was queued is dropped, payload and all.
    third = opened("learner")
    third.begin_epoch(weights, limit=LIMIT, window=WINDOW)
    driver.set_state("draining", "asked to")

    status = observer.status()
    assert (status.state, status.dead, status.depth) == ("draining", 1, 0)
    assert observer.state() == "draining"
    assert observer.read_metrics() == [(row, {"step": 1})]
    assert set(observer.heartbeats()) == {"rollout-0", "learner-0"}
    assert len(observer.dead_letters()) == 1
    observer.frontier()
    observer.latest("ema")


def test_each_part_can_do_its_work_with_its_own_login(
    server: AclServer, run: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the processes of a run open the queue where `queue.logins` is set; an observer is none of them."""
    config = own_logins(server, monkeypatch)
    context = RunContext(run=run, directory=tmp_path, config=config, queue_url=str(config.queue.url))

    def opened(part: str) -> GroupQueue:
        if part == "observer":
            return queue(server, part, run)
        return context.open_queue(part)  # type: ignore[arg-type]

    whole_run(server, run, opened)
    assert server.denied() == []
    with pytest.raises(redis.ResponseError, match=r"ACL failure|NOPERM|can't run"):
        opened("worker").begin_epoch(weights, limit=LIMIT, window=WINDOW)
    server.denied()


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


@pytest.mark.slow
def test_a_whole_run_with_a_login_for_each_part(
    server: AclServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Learner, workers, evaluator and driver each in their own process: nobody asks for what is another's."""
    config = own_logins(server, monkeypatch)
    logins = json.dumps({part: login.model_dump() for part, login in config.queue.logins.items()})
    small = [
        *(f"queue.url={config.queue.url}", f"queue.logins={logins}", f"run.directory={tmp_path}"),
        *("learner.max_steps=2", "learner.groups_per_step=2", "rollout.group_size=4"),
        *("learner.micro_batch=4", "eval.prompts=4", "eval.final_prompts=4"),
    ]
    overrides = [word for pair in small for word in ("--set", pair)]
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", "train", "quickstart", "--json", *overrides],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 2
    assert server.denied() == []


def test_one_login_for_all_parts(server: AclServer, run: str) -> None:
    whole_run(server, run, lambda _: queue(server, "run", run))
    assert server.denied() == []


@pytest.mark.parametrize("user", ["learner", "run"])
def test_scripts_are_loaded_by_whoever_comes_first(server: AclServer, run: str, user: str) -> None:
    with server.admin() as admin:
        admin.script_flush()
    queue(server, user, run).status()
    assert server.denied() == []


FORBIDDEN = {
    "worker": [
        ("HSET", "latest", "policy", "mine"),
        ("XADD", "weights", "*", "announcement", "mine"),
        ("HSET", "plan", "0", "1"),
        ("XADD", "metrics", "*", "row", "{}"),
        ("XREADGROUP", "GROUP", "learner:0", "learner", "STREAMS", "groups", ">"),
        ("XRANGE", "groups", "-", "+"),
        ("MGET", "payload:00"),
        ("XACK", "groups", "learner:0", "0-1"),
        ("XDEL", "groups", "0-1"),
        ("GET", "hb:rollout-1"),
        ("DEL", "policy"),
        ("HGETALL", "policy"),
    ],
    "learner": [
        ("XADD", "groups", "*", "ordinal", "0"),
        ("SET", "payload:00", "x"),
        ("XRANGE", "dead", "-", "+"),
        ("XREAD", "STREAMS", "metrics", "0"),
    ],
    "driver": [
        ("XADD", "groups", "*", "ordinal", "0"),
        ("XREAD", "STREAMS", "groups", "0"),
        ("MGET", "payload:00"),
        ("XADD", "weights", "*", "announcement", "mine"),
        ("HSET", "latest", "policy", "mine"),
        ("SET", "hb:rollout-0", "{}"),
        ("DEL", "policy"),
    ],
    "observer": [
        ("HSET", "policy", "state", "done"),
        ("ZADD", "trained", "0", "0"),
        ("XADD", "metrics", "*", "row", "{}"),
        ("XADD", "wake", "*", "w", "1"),
        ("SADD", "parts", "me"),
        ("SET", "hb:me", "{}"),
        ("DEL", "policy"),
        ("XREAD", "STREAMS", "groups", "0"),
        ("MGET", "payload:00"),
    ],
    "run": [("DEL", "groups"), ("XTRIM", "groups", "MAXLEN", "0"), ("GET", "payload:00")],
}
KEYS = {*Keys("x").scripted} | {Keys("x").key(name) for name in ("metrics", "parts")}
NAMES = {key.rpartition(":")[2] for key in KEYS}


def with_keys(run: str, words: tuple[str, ...]) -> list[str]:
    own = Keys(run)
    return [own.key(word) if word in NAMES or re.match(r"(payload|hb):", word) else word for word in words]


@pytest.mark.parametrize(
    ("user", "words"), [(user, words) for user in FORBIDDEN for words in FORBIDDEN[user]]
)
def test_what_is_another_parts_is_refused(
    server: AclServer, run: str, user: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(redis.exceptions.NoPermissionError):
        server.client(user).execute_command(*with_keys(run, words))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize(
    "words",
    [
        *(("FLUSHALL",), ("FLUSHDB",), ("KEYS", "*"), ("SCAN", "0"), ("CONFIG", "GET", "*"), ("SHUTDOWN",)),
        *(("ACL", "LIST"), ("ACL", "SETUSER", "me"), ("CLIENT", "LIST"), ("MONITOR",), ("SAVE",)),
        *(("SCRIPT", "FLUSH"), ("EVAL", "return 1", "0"), ("FUNCTION", "LIST")),
        *(("REPLICAOF", "h", "1"), ("MODULE", "LIST"), ("SUBSCRIBE", "c"), ("PUBLISH", "c", "m"), ("INFO",)),
        *(("GET", "{other}:policy"), ("HSET", "{other}:policy", "a", "b"), ("HGET", "dgpo:policy", "a")),
    ],
    ids=lambda words: " ".join(words),
)
def test_nobody_may_administrate_or_leave_the_keys_of_runs(
    server: AclServer, user: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(redis.exceptions.NoPermissionError):
        server.client(user).execute_command(*words)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("user", "script", "arguments"),
    [
        ("worker", "commit", (0, 0, "policy", "mine")),
        ("worker", "announce", (0, 0, "ema", "mine")),
        ("worker", "plan", (0, 0, 0, 5)),
        ("worker", "read", (0, 0, "learner", 1, ">")),
        ("learner", "admit", (3, 8, 1024, "0 0 0 1 1 inline 00 w", "xx")),
        ("driver", "commit", (0, 0, "policy", "mine")),
        ("driver", "admit", (3, 8, 1024, "0 0 0 1 1 inline 00 w", "xx")),
        ("observer", "set_state", ("done", "")),
        ("observer", "issue", ("w", "n", 1000, 3)),
    ],
)
def test_a_script_does_no_more_than_its_caller_may(
    server: AclServer, run: str, user: str, script: str, arguments: tuple[object, ...]
) -> None:
    """EVALSHA is granted on all keys: what keeps a part to its own work are the commands inside.

    What a script wrote to the policy hash before it was refused stays: every part may write there anyway.
    """
    queue(server, "learner", run).begin_epoch(weights, limit=LIMIT, window=WINDOW)
    with server.admin() as admin:
        policy = Keys(run).key("policy").encode()
        before = {key: admin.dump(key) for key in admin.keys("*") if key != policy}
        with pytest.raises(redis.ResponseError, match=r"ACL failure|NOPERM|can't run"):
            Scripts(server.client(user), Keys(run)).run(script, *arguments)  # type: ignore[arg-type]
        after = {key: admin.dump(key) for key in admin.keys("*") if key != policy}
    assert before == after


def test_the_default_user_and_wrong_passwords_are_refused(server: AclServer) -> None:
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=server.port, protocol=2).ping()
    with pytest.raises(QueueUnreachable, match="refused the login"):
        connect(server.url("worker"), server.passwords["learner"])


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
