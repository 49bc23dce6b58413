"""deploy/redis: what is another part's is refused, in commands and inside scripts."""

from __future__ import annotations

import re

import pytest
import redis
from acl_server import LIMIT, USERS, WINDOW, AclServer, queue, weights

from services.group_queue import QueueUnreachable, connect
from services.queue_scripts import Keys, Scripts

pytestmark = pytest.mark.integration


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
        ("DEL", "turn"),
        ("DEL", "policy"),
    ],
    "observer": [
        ("HSET", "policy", "state", "done"),
        ("ZADD", "trained", "0", "0"),
        ("XADD", "metrics", "*", "row", "{}"),
        ("ZADD", "line", "0", "me"),
        ("RPUSH", "call:rollout-0", "1"),
        ("SADD", "parts", "me"),
        ("SET", "hb:me", "{}"),
        ("SET", "turn", "me"),
        ("DEL", "policy"),
        ("XREAD", "STREAMS", "groups", "0"),
        ("MGET", "payload:00"),
    ],
    "run": [("DEL", "groups"), ("XTRIM", "groups", "MAXLEN", "0"), ("GET", "payload:00")],
}
KEYS = {*Keys("x").scripted} | {Keys("x").key(name) for name in ("metrics", "parts", "turn")}
NAMES = {key.rpartition(":")[2] for key in KEYS}


def with_keys(run: str, words: tuple[str, ...]) -> list[str]:
    own = Keys(run)
    return [
        own.key(word) if word in NAMES or re.match(r"(payload|hb|call):", word) else word for word in words
    ]


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
    assert queue(server, "worker", run).issue("w") is not None, "so that its group could be admitted"
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
