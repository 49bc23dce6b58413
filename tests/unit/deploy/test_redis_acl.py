"""deploy/redis: each user can do all that its part of the code does, in calls and in a whole run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
import torch
from acl_server import LIMIT, WINDOW, AclServer, own_logins, queue, weights

from services.codec import EncodedGroup, encode_group
from services.config_file import PROJECT_ROOT
from services.context import RunContext
from services.group_queue import Admitted, Failed, GroupQueue, Lease
from services.messages import GroupHeader, Heartbeat, PolicyVersion, Prompt
from services.queue_scripts import Keys
from services.queue_worker import INLINE_BYTES

pytestmark = pytest.mark.integration


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
    for turn in (worker.turn("rollout-0", 10.0), learner.turn("learner-0", 10.0)):
        turn.take(1.0)
        turn.renew()
        turn.give()
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
    driver.want_replicas("ocr", 2)
    assert driver.wanted_replicas(["ocr", "tesseract"]) == {"ocr": 2}
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
    # Whoever waits is called by the part that makes room, or ends the run.
    while worker.issue("rollout-0"):
        pass
    assert worker.issue("rollout-1") is None and observer.status().waiting == 2
    driver.release_worker("rollout-1", "it died")
    worker.release("rollout-0", 0)
    assert observer.status().called == ("rollout-0",) and observer.status().waiting == 0
    assert worker.issue("rollout-0") is not None and worker.issue("rollout-0") is None
    driver.set_state("draining", "asked to")
    assert worker.wait_for_work(60)

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
