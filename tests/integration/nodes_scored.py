"""Asks a reward with a replica on each of two nodes, on the cluster of RAY_ADDRESS; tells who answered."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import ray

from benchmarks.reward_servers import DEADLINE_S, replicas
from benchmarks.timed_scorer import TIMED
from reward_servers.launch import LOOPBACK, start_serve

REQUESTS = 8


def main() -> None:
    ray.init(address="auto", log_to_driver=False)
    base = start_serve(LOOPBACK, 0, deadline_s=DEADLINE_S, request_timeout_s=DEADLINE_S)
    scale = {"num_replicas": 2, "max_replicas_per_node": 1}
    with replicas(base, TIMED, {"image_s": 0.5}, scale) as served:
        client, images = served.client(), np.zeros((1, 2, 2, 3), np.uint8)
        with ThreadPoolExecutor(REQUESTS) as threads:
            answers = list(threads.map(lambda _: client.score(images, "p"), range(REQUESTS)))
        sys.stdout.write(json.dumps([answer.details[0]["process"] for answer in answers]))


if __name__ == "__main__":
    main()
