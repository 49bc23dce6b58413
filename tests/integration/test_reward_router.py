"""Requests at once go to replicas that have none, whatever happened before; a busy one is passed by."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from nodes_scored import REQUESTS
from ray_nodes import cluster_on_this_machine

from benchmarks.reward_servers import TOKEN_ENV
from benchmarks.timed_scorer import TIMED
from reward_servers.client import RewardClient
from reward_servers.deployment import deployment_of
from reward_servers.launch import start_rewards, stop_rewards
from reward_servers.protocol import SCORE_PATH, TENSOR_TYPE
from reward_servers.server_config import ServerConfig
from reward_servers.wire import encode_tensors
from services.config import RewardConfig

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local")]

TOKEN = "a-token-for-tests-only"
DEADLINE_S = 240.0
REPLICAS = 3
IMAGE_S = 1.5
"""So long that requests at once are all there before one of them is answered, also on a busy machine."""
BUSY_IMAGES = 8


@pytest.fixture(scope="module")
def url(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    file = tmp_path_factory.mktemp("rewards") / "token"
    file.touch(0o600)
    file.write_text(TOKEN)
    timed = RewardConfig(
        name="timed",
        app=TIMED,
        args={"image_s": IMAGE_S, "max_batch": BUSY_IMAGES},
        num_cpus=0.1,
        replicas=REPLICAS,
    )
    started = start_rewards([timed], token_file=file, port=0, deadline_s=DEADLINE_S)["timed"]
    with_all = RewardClient("timed", started, TOKEN, DEADLINE_S, app=TIMED)
    wait_for_all(with_all)
    with_all.close()
    yield started
    stop_rewards()


@pytest.fixture
def client(url: str) -> Iterator[RewardClient]:
    found = RewardClient("timed", url, TOKEN, DEADLINE_S, app=TIMED)
    yield found
    found.close()


def process(client: RewardClient, images: int = 1) -> int:
    """The replica that has answered."""
    details = client.score(np.zeros((images, 2, 2, 3), np.uint8), "p").details
    return int(details[0]["process"])


def at_once(client: RewardClient, count: int) -> list[int]:
    with ThreadPoolExecutor(count) as threads:
        return sorted(threads.map(lambda _: process(client), range(count)))


def each_once(client: RewardClient) -> bool:
    """Three times, so that it does not just happen to come out so."""
    return all(len(set(at_once(client, REPLICAS))) == REPLICAS for _ in range(3))


def wait_for_all(client: RewardClient) -> None:
    """The proxy hears of a replica a little after Serve says that it runs."""
    give_up = time.monotonic() + DEADLINE_S
    while len(found := set(at_once(client, REPLICAS))) < REPLICAS:
        assert time.monotonic() < give_up, f"only these answer: {found}"


def test_as_many_requests_as_replicas_go_to_one_each(client: RewardClient) -> None:
    assert each_once(client)


def test_more_are_shared_out_evenly(client: RewardClient) -> None:
    served = at_once(client, 2 * REPLICAS)
    assert served == sorted(2 * list(dict.fromkeys(served)))


def test_a_busy_replica_is_passed_by(client: RewardClient) -> None:
    with ThreadPoolExecutor(1) as beside:
        long = beside.submit(process, client, BUSY_IMAGES)
        time.sleep(1.0)
        others = [process(client) for _ in range(2 * (REPLICAS - 1))]
        assert not long.done()
        assert long.result() not in others and len(set(others)) == REPLICAS - 1


def test_clients_that_leave_and_a_replica_that_dies_are_not_counted_on(
    client: RewardClient, url: str
) -> None:
    body = encode_tensors(np.zeros((1, 2, 2, 3), np.uint8), "p")
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": TENSOR_TYPE}
    for _ in range(4):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}{SCORE_PATH}", content=body, headers=headers, timeout=0.2)
    assert each_once(client)
    os.kill(process(client), signal.SIGKILL)
    wait_for_all(client)
    assert each_once(client)


@pytest.mark.slow
def test_replicas_of_other_nodes_than_the_proxy_have_their_share() -> None:
    """Serve's own router would give them nothing before 128 requests are at the replica beside it."""
    script = Path(__file__).with_name("nodes_scored.py")
    with cluster_on_this_machine("--num-cpus=1", **{TOKEN_ENV: TOKEN}) as cluster:
        cluster.add_node(cpus=1)
        told = subprocess.run(
            [sys.executable, str(script)],
            env=cluster.environment | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"},
            stdout=subprocess.PIPE,
            timeout=DEADLINE_S,
            check=True,
        )
    assert sorted(Counter(json.loads(told.stdout.splitlines()[-1])).values()) == [REQUESTS / 2, REQUESTS / 2]


def test_the_package_is_not_needed_where_it_routes() -> None:
    """A proxy of a cluster has Ray alone."""
    config = ServerConfig(app=TIMED, token_env="A_TOKEN")
    router = deployment_of(config)._deployment_config.request_router_config
    code = (
        "import sys, ray.cloudpickle as pickle; sys.modules['reward_servers'] = None; "
        "print(pickle.loads(sys.stdin.buffer.read()).__name__)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        input=router.get_serialized_request_router_cls(),
        capture_output=True,
        cwd=Path("/"),
        check=True,
    )
    assert told.stdout.decode().strip() == "FewestRequests"
