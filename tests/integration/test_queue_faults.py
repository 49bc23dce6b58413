"""What goes wrong between the parties: expired leases, damaged and forged entries, broken connections."""

from __future__ import annotations

import pytest
import redis
import torch
from queue_support import Run, version

from services.embedded import EmbeddedValkey
from services.group_queue import Admitted, Frontier, GroupQueue, QueueTimeout, QueueUnreachable, connect
from services.safetensors_layout import pack

pytestmark = pytest.mark.integration

EXPIRED = 0


@pytest.fixture
def client(valkey: EmbeddedValkey) -> redis.Redis:
    return connect(valkey.url, valkey.password)


def expire(run: Run, client: redis.Redis, ordinal: int) -> None:
    """As if `lease_s` had passed without a renewal."""
    client.zadd(run.raw("leases"), {str(ordinal): EXPIRED})


def test_an_expired_lease_is_issued_before_anything_else(run: Run, client: redis.Redis) -> None:
    run.begin()
    run.leases("w0")
    expire(run, client, 1)
    lease = run.worker.issue("w1")
    assert lease is not None
    assert (lease.ordinal, lease.attempt) == (1, 2)
    assert not run.worker.renew("w0", 1)
    assert run.worker.issue("w1") is None


def test_a_group_admitted_after_its_lease_expired_counts_once(run: Run, client: redis.Redis) -> None:
    run.begin()
    first, _ = run.leases("w0")
    expire(run, client, first.ordinal)
    second = run.worker.issue("w1")
    assert second is not None
    assert run.worker.admit(run.group(first, worker="w0")) is Admitted.OK
    assert run.worker.admit(run.group(second, worker="w1")) is Admitted.DUP
    assert not run.worker.renew("w1", second.ordinal)
    assert run.learner.status().outstanding == 2


def test_a_late_group_saves_an_ordinal_that_waits_to_be_issued_again(run: Run) -> None:
    run.begin()
    first, _ = run.leases("w0")
    run.learner.release_worker("w0", "seemed dead")
    assert run.worker.admit(run.group(first, worker="w0")) is Admitted.OK
    assert [lease.ordinal for lease in run.leases("w1")] == [1]


def test_a_lease_that_keeps_expiring_ends_among_the_dead_letters(
    valkey: EmbeddedValkey, run_name: str, client: redis.Redis
) -> None:
    run = Run(valkey, run_name, max_attempts=2)
    run.begin(window=1)
    for worker in ("w0", "w1"):
        lease = run.worker.issue(worker)
        assert lease is not None
        assert lease.ordinal == 0
        expire(run, client, 0)
    lease = run.worker.issue("w2")
    assert lease is not None
    assert lease.ordinal == 1
    (letter,) = run.learner.dead_letters()
    assert letter.ordinal == 0
    assert letter.reason == "its lease expired 2 times, last held by w1"


@pytest.mark.timeout(60)
def test_the_wait_of_a_worker_ends_when_a_lease_expires(run: Run) -> None:
    run.begin()
    brief = run.queue(lease_s=0.2)
    assert len(run.leases("w0", brief)) == 2
    # Whoever waits for as long as it takes is back when there is something to be had.
    while (lease := run.worker.issue("w1")) is None:
        run.worker.wait_for_work(timeout_s=3600)
    assert (lease.ordinal, lease.attempt) == (0, 2)


def damage(client: redis.Redis, run: Run, ordinal: int, body: bytes, sha256: bytes | None = None) -> None:
    """Put the group's entry back with other content, as a hand at the server could."""
    entries = {int(found[b"ordinal"]): entry for entry, found in client.xrange(run.raw("groups"))}
    record = client.hget(run.raw("queued"), str(ordinal)).split(b" ")
    client.xdel(run.raw("groups"), entries[ordinal])
    record[0] = client.xadd(run.raw("groups"), {"ordinal": ordinal, "group": body})
    if sha256 is not None:
        record[6] = sha256
    client.hset(run.raw("queued"), str(ordinal), b" ".join(record))


def resigned(run: Run, ordinal: int, payload: bytes | None = None, at: int = 0) -> tuple[bytes, bytes]:
    """A group whose digest is right and whose content is not."""
    from hashlib import sha256

    group = run.group(ordinal, at=version(0, at))
    body = group.header + (payload if payload is not None else group.payload)
    return body, sha256(body).hexdigest().encode()


def whole(run: Run) -> bytes:
    group = run.group(0, at=version(0, 0))
    return group.header + group.payload


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (lambda run: (whole(run)[:-1],), "truncated or tampered"),
        (lambda run: (run.group(0, at=version(0, 0)).header,), "has no payload"),
        (lambda run: (b"",), "has no payload"),
        (lambda run: (whole(run), b"00"), "truncated or tampered"),
        (lambda run: (whole(run).replace(b"w0", b"w1"),), "truncated or tampered"),
        (lambda run: resigned(run, 1), "header says it is group"),
        (lambda run: resigned(run, 0, at=1), "says version 0.1, admitted as 0.0"),
        (lambda run: resigned(run, 0, b"12345678"), "not safetensors"),
        (lambda run: resigned(run, 0, pack({"latents": torch.full((2, 4), torch.nan)})), "not finite"),
        (lambda run: resigned(run, 0, pack({"latents": torch.zeros(1, 4)})), "one for each seed"),
    ],
)
def test_a_damaged_group_is_not_trained_and_not_lost(
    valkey: EmbeddedValkey,
    run_name: str,
    client: redis.Redis,
    fields: object,
    says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Run(valkey, run_name, max_attempts=2)
    run.begin()
    run.fill()
    damage(client, run, 0, *fields(run))  # type: ignore[operator]
    with pytest.raises(QueueTimeout, match="has 1 of 2"):
        run.learner.take(2, deadline_s=0.05)
    assert says in caplog.text
    assert run.learner.status().depth == 1
    lease = run.worker.issue("w1")
    assert lease is not None
    assert (lease.ordinal, lease.attempt) == (0, 2)
    assert run.worker.admit(run.group(lease, worker="w1")) is Admitted.OK
    assert run.step() == [0, 1]


def test_an_ordinal_whose_groups_are_always_damaged_is_given_up_with_the_reason(
    valkey: EmbeddedValkey, run_name: str, client: redis.Redis
) -> None:
    run = Run(valkey, run_name, max_attempts=1)
    run.begin()
    run.fill()
    damage(client, run, 0, whole(run)[:-1])
    with pytest.raises(QueueTimeout):
        run.learner.take(2, deadline_s=0.05)
    (letter,) = run.learner.dead_letters()
    assert letter.ordinal == 0
    assert "sha256" in letter.reason
    assert run.fill() == [2]
    assert run.step() == [1, 2]


def test_entries_that_were_never_admitted_are_removed_and_not_trained(
    run: Run, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    run.begin()
    run.leases()
    group = run.group(0, at=version(0, 0))
    forged = {"group": group.header + group.payload}
    client.xadd(run.raw("groups"), {"ordinal": 0, **forged})
    client.xadd(run.raw("groups"), {"ordinal": "../../x", **forged})
    client.xadd(run.raw("groups"), {"nonsense": 1})
    with pytest.raises(QueueTimeout, match="has 0 of 2"):
        run.learner.take(2, deadline_s=0.05)
    assert caplog.text.count("was never admitted") == 3
    assert client.xlen(run.raw("groups")) == 0


@pytest.mark.parametrize("record", [b"%s 0 0 800 - w0", b"%s what is this"])
@pytest.mark.parametrize("resumed", [False, True])
def test_what_another_version_of_the_queue_recorded_is_made_again(
    run: Run, client: redis.Redis, record: bytes, resumed: bool
) -> None:
    run.begin()
    run.fill()
    entries = {int(found[b"ordinal"]): entry for entry, found in client.xrange(run.raw("groups"))}
    client.hset(run.raw("queued"), "0", record % entries[0])
    if resumed:
        run.begin()
    else:
        with pytest.raises(QueueTimeout, match="has 1 of 2"):
            run.learner.take(2, deadline_s=0.05)
    lease = run.worker.issue("w1")
    assert lease is not None
    assert lease.ordinal == 0
    assert run.worker.admit(run.group(lease, worker="w1")) is Admitted.OK
    assert run.step() == [0, 1]
    assert client.xlen(run.raw("groups")) == 0


def test_groups_delivered_into_a_broken_connection_are_read_again(run: Run, client: redis.Redis) -> None:
    run.begin()
    run.fill()
    # The reply of this read never reaches the learner.
    client.xreadgroup("learner:0", "learner", {run.raw("groups"): ">"}, count=1)
    assert [group.header.ordinal for group in run.learner.take(2, deadline_s=10)] == [0, 1]


def test_scripts_are_loaded_again_when_the_server_forgot_them(run: Run, client: redis.Redis) -> None:
    run.begin()
    client.script_flush()
    (first, second) = run.leases()
    client.script_flush()
    assert run.worker.admit_many([run.group(first), run.group(second)]) == [Admitted.OK, Admitted.OK]


def test_a_server_that_was_killed_comes_back_with_what_it_had(
    tmp_path_factory: pytest.TempPathFactory, run_name: str
) -> None:
    with EmbeddedValkey(tmp_path_factory.mktemp("killed")) as server:
        run = Run(server, run_name)
        run.begin()
        run.fill()
        run.learner.take(2, deadline_s=10)
        # Until the append-only file is on the disk.
        connect(server.url, server.password).execute_command("WAITAOF", 1, 0, 10000)
        port = server.port
        server.kill()
        server.start()
        assert server.port == port
        assert run.step() == [0, 1]
        assert run.fill() == [2, 3]
        assert run.learner.frontier() == Frontier(below=2)


def test_every_key_of_a_run_is_in_its_hash_slot(run: Run, client: redis.Redis) -> None:
    run.begin()
    run.fill()
    run.step()
    run.leases()
    run.worker.fail("w0", 2, "x")
    run.learner.append_metrics({"step": 1})
    tag = f"{{dgpo:{run.name}}}:".encode()
    assert [key for key in client.scan_iter(match=f"*{run.name}*") if not key.startswith(tag)] == []


def test_an_observer_without_a_learner_sees_an_empty_queue(run: Run) -> None:
    status = run.worker.status()
    assert (status.version, status.state, status.depth, status.next) == (None, None, 0, 0)
    assert run.worker.frontier() == Frontier()
    assert run.worker.latest() is None


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:1", "scheme is http"),
        ("127.0.0.1", "must begin with redis://"),
        ("redis://127.0.0.1:99999", "port"),
        ("redis://127.0.0.1:1?foo=bar", "127.0.0.1:1: .*'foo'"),
        ("unix:///no/such/socket", "/no/such/socket cannot be reached"),
        ("redis://127.0.0.1:1/0", "127.0.0.1:1 cannot be reached"),
        ("redis://no.such.host.invalid:6390", "no.such.host.invalid:6390 cannot be reached"),
    ],
)
def test_a_wrong_address_is_named(url: str, says: str) -> None:
    with pytest.raises(QueueUnreachable, match=says):
        connect(url, "secret", deadline_s=0.2)


@pytest.mark.parametrize("password", ["wrong-secret", None])
def test_a_wrong_password_is_named_and_not_told(valkey: EmbeddedValkey, password: str | None) -> None:
    with pytest.raises(QueueUnreachable, match=rf"127.0.0.1:{valkey.port} refused the login") as caught:
        connect(valkey.url, password)
    assert "wrong-secret" not in str(caught.value)


def test_an_acl_user_logs_in(valkey: EmbeddedValkey, client: redis.Redis) -> None:
    client.acl_setuser(
        "worker", enabled=True, passwords=["+w0rker"], commands=["+ping", "+get"], keys=["x"], reset=True
    )
    try:
        connected = connect(valkey.url.replace("redis://", "redis://worker@"), "w0rker")
        assert connected.get("x") is None
        with pytest.raises(redis.exceptions.NoPermissionError):
            connected.set("x", 1)
    finally:
        client.acl_deluser("worker")


def test_a_server_that_speaks_something_else_is_named() -> None:
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        port = listener.getsockname()[1]
        with pytest.raises(QueueUnreachable, match=f"127.0.0.1:{port}"):
            connect(f"redis://127.0.0.1:{port}", deadline_s=0.2)


def test_one_process_may_use_one_queue_from_several_threads(run: Run) -> None:
    from concurrent.futures import ThreadPoolExecutor

    run.begin(window=10)

    def work(index: int) -> int:
        made = 0
        while (lease := run.worker.issue(f"w{index}")) is not None:
            made += run.worker.admit(run.group(lease, worker=f"w{index}")) is Admitted.OK
        return made

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) == 10
    assert run.learner.status().queued == tuple(range(10))


def test_the_queue_of_another_run_is_another_queue(valkey: EmbeddedValkey, run: Run) -> None:
    other = Run(valkey, run.name + "x")
    run.begin()
    other.begin()
    run.fill()
    assert isinstance(other.learner, GroupQueue)
    assert other.learner.status().depth == 0
    assert [lease.ordinal for lease in other.leases()] == [0, 1]
