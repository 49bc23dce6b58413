"""What the group queue costs over bare streams: whole groups through admit, take and commit, against raw
pipelined XADD and XREAD of the same bytes by a stock client, on the same server, in turns.

Ours does all that the queue does with a group: the admit script, read, verify (sha256), decode, and the
commit script that acknowledges and deletes. Raw writes and reads entries of the same bytes, a field for
each part of a group, and deletes nothing in the time that counts. Both send and read a step's groups at a
time, from one thread, and both are given bytes that were made before:
encoding is not timed, nor is issuing ordinals; raw has nothing like them. The figure is the median of the
ratios of neighbouring passes: other work on the machine comes and goes.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import redis
import torch
from rich.console import Console
from rich.table import Table

from services.config import QueueConfig
from services.embedded import EmbeddedValkey
from services.group_queue import Admitted, GroupQueue, Lease, connect, encode_group
from services.messages import GroupHeader, PolicyVersion, Prompt, WeightsAnnouncement

GROUP_SIZE = 16
CHANNELS = 16
TARGETS = {3_000_000: 0.6, 10_000: 0.4}
"""Bytes of a group -> share of the raw rate that it must reach."""


def run_queue_bench(
    screen: Console | None = None,
    *,
    sizes: tuple[int, ...] = tuple(TARGETS),
    groups_per_step: int = 24,
    pass_bytes: int = 72_000_000,
    max_groups: int = 480,
    passes: int = 15,
) -> dict[str, Any]:
    """Rates and their ratio for each size of a group.

    Args:
        sizes: latents of one group, bytes.
        groups_per_step: groups sent and read at a time.
        pass_bytes: moved in one pass, unless `max_groups` are fewer.
        passes: of each side; raw and ours take turns.

    Returns:
        `sizes`: bytes -> raw and ours in MB/s and groups/s, `ratio` (median), `target`, `met`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # What lives for ever is not looked at by the collector again: as in a process that has started up.
    gc.collect()
    gc.freeze()
    result: dict[str, Any] = {"benchmark": "queue", "groups_per_step": groups_per_step, "sizes": {}}
    try:
        with tempfile.TemporaryDirectory() as folder, EmbeddedValkey(Path(folder)) as server:
            for size in sizes:
                steps = max(1, min(max_groups, pass_bytes // size) // groups_per_step)
                result["sizes"][str(size)] = _compare(server, size, groups_per_step, steps, passes)
    finally:
        torch.set_num_threads(threads)
        gc.unfreeze()
    if screen is not None:
        screen.print(_table(result))
    return result


def _compare(server: EmbeddedValkey, size: int, groups: int, steps: int, passes: int) -> dict[str, Any]:
    client = redis.Redis.from_url(server.url, password=server.password, protocol=2)
    latents = latents_of(size)
    group = encode_group(header("raw", Lease(0, 1, PolicyVersion(epoch=0, step=0))), {"latents": latents})
    entry = {"ordinal": 0, "header": group.header, "sha256": group.sha256, "payload": group.payload}
    _raw_pass(client, entry, groups, 1)
    _our_pass(server, "warm-up", latents, groups, 1)
    raw, ours = [], []
    for number in range(passes):
        raw.append(_raw_pass(client, entry, groups, steps))
        ours.append(_our_pass(server, f"{size}-{number}", latents, groups, steps))
    count = groups * steps
    ratio = statistics.median(slow / fast for slow, fast in zip(raw, ours, strict=True))
    target = TARGETS.get(size)
    return {
        "raw_mb_s": count * group.size / statistics.median(raw) / 1e6,
        "ours_mb_s": count * group.size / statistics.median(ours) / 1e6,
        "raw_groups_s": count / statistics.median(raw),
        "ours_groups_s": count / statistics.median(ours),
        "ratio": ratio,
        "ratio_min": min(slow / fast for slow, fast in zip(raw, ours, strict=True)),
        "ratio_max": max(slow / fast for slow, fast in zip(raw, ours, strict=True)),
        "target": target,
        "met": target is None or ratio >= target,
    }


def _raw_pass(client: redis.Redis, entry: dict[str, Any], groups: int, steps: int) -> float:
    """Seconds to write and read the bytes through a bare stream."""
    seconds, last = 0.0, b"0-0"
    for _ in range(steps):
        started = time.perf_counter()
        pipeline: Any = client.pipeline(transaction=False)
        for _ in range(groups):
            pipeline.xadd("raw", entry)
        pipeline.execute()
        answer: Any = client.xread({"raw": last}, count=groups)
        seconds += time.perf_counter() - started
        entries = answer[0][1]
        last = entries[-1][0]
        client.xtrim("raw", maxlen=0, approximate=False)
    client.delete("raw")
    return seconds


def _our_pass(server: EmbeddedValkey, run: str, latents: torch.Tensor, groups: int, steps: int) -> float:
    """Seconds to bring the same bytes as whole groups from a worker to a learner that commits them."""
    config = QueueConfig(max_staleness=0)
    worker = GroupQueue(connect(server.url, server.password), run, config)
    learner = GroupQueue(connect(server.url, server.password), run, config)
    version = learner.begin_epoch(announcement, limit=groups * steps, window=groups)
    seconds = 0.0
    for _ in range(steps):
        leases = [lease for _ in range(groups) if (lease := worker.issue("bench")) is not None]
        encoded = [encode_group(header(run, lease), {"latents": latents}) for lease in leases]
        started = time.perf_counter()
        answers = worker.admit_many(encoded)
        taken = learner.take(groups, deadline_s=60.0)
        following = PolicyVersion(epoch=version.epoch, step=version.step + 1)
        version = learner.commit(announcement(following), [group.header.ordinal for group in taken])
        seconds += time.perf_counter() - started
        if set(answers) != {Admitted.OK}:
            raise RuntimeError(f"the queue refused a group: {answers}")
    return seconds


def latents_of(size: int) -> torch.Tensor:
    """Of one group, so many bytes."""
    return torch.randn(GROUP_SIZE, CHANNELS, size // (4 * GROUP_SIZE * CHANNELS))


def announcement(version: PolicyVersion) -> WeightsAnnouncement:
    """Of weights that nobody fetches."""
    return WeightsAnnouncement(version=version, digest="0" * 64, tensors=1, bytes=1)


def header(run: str, lease: Lease, worker: str = "bench") -> GroupHeader:
    """Of a group of `GROUP_SIZE` samples."""
    return GroupHeader(
        run=run,
        ordinal=lease.ordinal,
        attempt=lease.attempt,
        version=lease.version,
        prompt=Prompt(text='a sign that says "K7QX"', metadata={"word": "K7QX"}),
        seeds=tuple(range(GROUP_SIZE)),
        rewards={"ocr": tuple(place / GROUP_SIZE for place in range(GROUP_SIZE))},
        worker=worker,
        sample_s=1.0,
        reward_s=1.0,
    )


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['groups_per_step']} groups a step", title_justify="left")
    for heading in ("group", "raw MB/s", "ours MB/s", "ours groups/s", "ratio (min-max)", "target"):
        table.add_column(heading, justify="right")
    for size, row in result["sizes"].items():
        table.add_row(
            f"{int(size):,} B",
            f"{row['raw_mb_s']:.0f}",
            f"{row['ours_mb_s']:.0f}",
            f"{row['ours_groups_s']:.0f}",
            f"{row['ratio']:.2f} ({row['ratio_min']:.2f}-{row['ratio_max']:.2f})",
            "-" if row["target"] is None else f">= {row['target']:.2f}" + ("" if row["met"] else "  missed"),
        )
    return table
