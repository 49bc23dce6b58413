"""The group queue under many workers: simulated ones, which wait in place of sampling and bring real groups
of 3 MB, against one server and one learner that takes and commits them without training.

All of it shares the machine: the server, the learner, which verifies and decodes every group, and the
workers, which encode them. On two cores groups/s at saturation is what these three reach together. Workers
have machines of their own elsewhere: here they run at low priority, and a probe at normal priority says how
long `issue` takes where nothing but the queue is waited for. What the workers see, whose threads wait for
each other and for a core, is told beside it.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.queue import announcement, header, latents_of
from services.config import QueueConfig
from services.embedded import EmbeddedValkey
from services.group_queue import Admitted, GroupQueue, RunEnded, connect, encode_group
from services.messages import PolicyVersion

WORKERS: Final = (8, 64, 512)
PROCESSES: Final = 4
LATENCY_TARGET_S: Final = 0.05
"""Of `issue`, 99th percentile."""
DEADLINE_S: Final = 120.0
MAX_STALENESS: Final = 1
NICENESS: Final = 15
"""Of the simulated workers."""
PROBE_EVERY_S: Final = 0.02
RUN: Final = "load"


def run_load_bench(
    screen: Console | None = None,
    *,
    workers: Sequence[int] = WORKERS,
    group_bytes: int = 3_000_000,
    sample_s: float = 0.5,
    seconds: float = 20.0,
) -> dict[str, Any]:
    """Rates, latencies and fairness for each number of workers.

    Args:
        workers: simulated at once.
        sample_s: a worker waits so long for a group, give or take a fifth.
        seconds: measured, behind a fifth of that to warm up.

    Returns:
        `workers`: their number -> `groups_s`, `offered_s` (what they could bring), `issue_p50_s` and
        `issue_p99_s` (of the probe), `crowded_p99_s` (of the workers), `waits` (share of calls that were told
        to wait), `fewest` and `most` (groups of a worker), `jain` (fairness, 1 is best), `starved` (workers
        without any group), `outstanding` (the most that was leased or queued, before a take and behind it),
        `window`; and `met`.
    """
    result: dict[str, Any] = {
        "benchmark": "load",
        "group_bytes": group_bytes,
        "sample_s": sample_s,
        "workers": {},
    }
    torch.set_num_threads(1)
    for count in workers:
        with tempfile.TemporaryDirectory() as folder, EmbeddedValkey(Path(folder)) as server:
            found = _measure(server, count, group_bytes, sample_s, seconds)
        result["workers"][str(count)] = found
    result["target_s"] = LATENCY_TARGET_S
    result["met"] = all(
        found["issue_p99_s"] < LATENCY_TARGET_S and not found["starved"]
        for found in result["workers"].values()
    )
    if screen is not None:
        screen.print(_table(result))
    return result


def _measure(
    server: EmbeddedValkey, workers: int, group_bytes: int, sample_s: float, seconds: float
) -> dict[str, Any]:
    groups = max(4, workers // 8)
    window = (MAX_STALENESS + 1) * groups
    config = QueueConfig(max_staleness=MAX_STALENESS, max_groups=2 * window)
    queue = GroupQueue(connect(server.url, server.password), RUN, config)
    version = queue.begin_epoch(announcement, limit=10**9, window=window)
    spawn = multiprocessing.get_context("spawn")
    shares = [range(workers)[part::PROCESSES] for part in range(min(PROCESSES, workers))]
    begun, measuring = spawn.Barrier(len(shares) + 2), spawn.Event()
    answers: Any = spawn.Queue()
    probed: Any = spawn.Queue()
    place = (server.url, server.password, config)
    processes = [
        spawn.Process(target=_simulate, args=(place, share, group_bytes, sample_s, begun, measuring, answers))
        for share in shares
    ]
    processes.append(spawn.Process(target=_probe, args=(place, begun, measuring, probed)))
    for process in processes:
        process.start()
    begun.wait(DEADLINE_S)
    trained, most = 0, 0
    warm = time.monotonic() + seconds / 5
    over = warm + seconds
    while (now := time.monotonic()) < over:
        most = max(most, queue.status().outstanding)
        taken = queue.take(groups, deadline_s=DEADLINE_S)
        most = max(most, queue.status().outstanding)
        following = PolicyVersion(epoch=version.epoch, step=version.step + 1)
        version = queue.commit(announcement(following), [group.header.ordinal for group in taken])
        if measuring.is_set():
            trained += groups
        elif now >= warm:
            measuring.set()
            warm = time.monotonic()
    took = time.monotonic() - warm
    measuring.clear()
    queue.set_state("done")
    heard = [answers.get(timeout=DEADLINE_S) for _ in shares]
    probe = sorted(probed.get(timeout=DEADLINE_S))
    for process in processes:
        process.join(DEADLINE_S)
    return _found(heard, trained, took, sample_s) | {
        "issue_p50_s": statistics.median(probe),
        "issue_p99_s": _p99(probe),
        "outstanding": most,
        "window": window,
    }


def _p99(ascending: Sequence[float]) -> float:
    return ascending[int(0.99 * len(ascending))]


def _found(heard: Sequence[Any], trained: int, took: float, sample_s: float) -> dict[str, Any]:
    latencies = sorted(latency for latencies, _, _ in heard for latency in latencies)
    waits = sum(waits for _, waits, _ in heard)
    brought = [count for _, _, counts in heard for count in counts]
    return {
        "groups_s": trained / took,
        "offered_s": len(brought) / sample_s,
        "crowded_p99_s": _p99(latencies),
        "waits": waits / len(latencies),
        "fewest": min(brought),
        "most": max(brought),
        "jain": sum(brought) ** 2 / (len(brought) * sum(count**2 for count in brought)),
        "starved": brought.count(0),
    }


def _simulate(
    place: tuple[str, str, QueueConfig],
    share: Sequence[int],
    group_bytes: int,
    sample_s: float,
    begun: Any,
    measuring: Any,
    answers: Any,
) -> None:
    """Some of the workers, each a thread with a connection of its own."""
    os.nice(NICENESS)
    torch.set_num_threads(1)
    url, password, config = place
    latents = latents_of(group_bytes)
    latencies: list[float] = []
    waits, counts = [0] * len(share), [0] * len(share)

    def work(index: int) -> None:
        name, rng = f"rollout-{share[index]}", random.Random(share[index])
        queue = GroupQueue(connect(url, password, deadline_s=DEADLINE_S), RUN, config)
        try:
            while True:
                started = time.perf_counter()
                lease = queue.issue(name)
                if measuring.is_set():
                    latencies.append(time.perf_counter() - started)
                    waits[index] += lease is None
                if lease is None:
                    queue.wait_for_work(1.0)
                    continue
                time.sleep(sample_s * rng.uniform(0.8, 1.2))
                group = encode_group(header(RUN, lease, name), {"latents": latents})
                while queue.admit(group) is Admitted.FULL:
                    time.sleep(0.1)
                counts[index] += measuring.is_set()
        except RunEnded:
            return

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(share))]
    for thread in threads:
        thread.start()
    begun.wait(DEADLINE_S)
    for thread in threads:
        thread.join()
    answers.put((latencies, sum(waits), counts))


def _probe(place: tuple[str, str, QueueConfig], begun: Any, measuring: Any, answers: Any) -> None:
    """One more worker, that gives back at once what it gets."""
    url, password, config = place
    queue = GroupQueue(connect(url, password, deadline_s=DEADLINE_S), RUN, config)
    latencies: list[float] = []
    begun.wait(DEADLINE_S)
    try:
        while True:
            started = time.perf_counter()
            lease = queue.issue("probe")
            if measuring.is_set():
                latencies.append(time.perf_counter() - started)
            if lease is not None:
                queue.release("probe", lease.ordinal)
            time.sleep(PROBE_EVERY_S)
    except RunEnded:
        answers.put(latencies)


def _table(result: dict[str, Any]) -> Table:
    size, wait = result["group_bytes"] / 1e6, result["sample_s"]
    told = "" if result["met"] else "  MISSED"
    target = f"issue p99 < {result['target_s'] * 1e3:g} ms, nobody starved"
    title = f"groups of {size:g} MB, {wait:g} s each; {target}{told}"
    table = Table(title=title, title_justify="left")
    for heading in (
        *("workers", "groups/s", "offered", "issue ms p50", "p99", "p99 of workers", "told to wait"),
        *("groups of a worker", "fairness", "outstanding of window"),
    ):
        table.add_column(heading, justify="right")
    for workers, found in result["workers"].items():
        table.add_row(
            workers,
            f"{found['groups_s']:.1f}",
            f"{found['offered_s']:.0f}",
            f"{found['issue_p50_s'] * 1e3:.1f}",
            f"{found['issue_p99_s'] * 1e3:.1f}",
            f"{found['crowded_p99_s'] * 1e3:.1f}",
            f"{found['waits']:.0%}",
            f"{found['fewest']} to {found['most']}",
            f"{found['jain']:.3f}",
            f"{found['outstanding']} of {found['window']}",
        )
    return table
