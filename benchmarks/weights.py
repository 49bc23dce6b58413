"""What proven weights cost over bare copies: LoRA tensors from a learner to several workers of one node.

Bare: one copy of each tensor into a buffer, `ray.put`, and in each worker `ray.get` and a copy into its own
tensors. Ours, by each transport: `publish` (encode, digest, send) and in each worker `install` (receive,
number of tensors, digest, parameters bound to the proven memory). In turns; the figure is the median of the
ratios to the bare copies of the same turn. Ray's round trips are in all of them. Publish buffers are reused:
first-touch page faults would drown the rest.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, get_args

import numpy as np
import ray
import torch
from rich.console import Console
from rich.table import Table

from services.codec import decode_weights, encode_weights
from services.config import LearnerConfig
from services.config_file import load_config
from services.messages import PolicyVersion, WeightsAnnouncement
from services.policy_store import PolicyStore, install, publish
from services.ray_runtime import start_on_loopback
from services.transports.base import WeightsTransport
from services.transports.choice import open_transport

DEADLINE_S = 300.0
TARGET = 1.5
"""Of the first transport, the default."""
TRANSPORTS: Final[tuple[str, ...]] = tuple(
    name for name in get_args(LearnerConfig.model_fields["publish_through"].annotation) if name != "nccl"
)
"""Those between workers on the CPU."""


def transport_of(name: str, directory: Path, store: Any) -> WeightsTransport:
    config = load_config("quickstart", [f"learner.publish_through={name}"])
    return open_transport(config, directory, store)


def lora_tensors(total_bytes: int, seed: int) -> dict[str, torch.Tensor]:
    """A and B matrices of rank 64 for projections of 1536, as SD3.5-M has them, up to `total_bytes`."""
    generator = torch.Generator().manual_seed(seed)
    each = 64 * 1536 * 4
    return {
        f"transformer_blocks.{index // 16}.attn.{index % 16 // 2}.lora_{'AB'[index % 2]}.weight": torch.randn(
            (64, 1536) if index % 2 == 0 else (1536, 64), generator=generator
        )
        for index in range(max(1, total_bytes // each))
    }


class BenchWorker:
    """A rollout worker that only installs weights."""

    def __init__(self, total_bytes: int) -> None:
        torch.set_num_threads(1)
        self._parameters = {name: torch.zeros_like(t) for name, t in lora_tensors(total_bytes, 0).items()}

    def ready(self) -> None:
        """Answers once it has started."""

    def copy(self, reference: list[Any]) -> None:
        """Bare: bytes from the object store into the parameters."""
        tensors = decode_weights(ray.get(reference[0], timeout=DEADLINE_S))
        torch._foreach_copy_(list(self._parameters.values()), [tensors[name] for name in self._parameters])

    def open(self, directory: Path, store: Any) -> None:
        """Get ready to receive by every transport."""
        self._transports = {name: transport_of(name, directory, store) for name in TRANSPORTS}

    def install(self, name: str, announcement: str) -> int:
        """Ours: proven, then bound to the parameters."""
        told = WeightsAnnouncement.model_validate_json(announcement)
        return install(self._transports[name], told, self._parameters)


def run_weights_bench(
    screen: Console | None = None,
    *,
    total_bytes: int = 75_000_000,
    workers: int = 8,
    passes: int = 9,
) -> dict[str, Any]:
    """Seconds from tensors of the learner to tensors of every worker, bare and proven.

    Starts a Ray on loopback if none is initialised.

    Returns:
        `bare_s` (median), `target`, of the object store; and in `transports`, by name, `ours_s` (median), of
        which `publish_s`, `ratio` (median), `ratio_min`, `ratio_max`.
    """
    started = not ray.is_initialized()
    if started:
        start_on_loopback(2, object_store_bytes=max(400_000_000, 8 * total_bytes))
    try:
        result = _measure(total_bytes, workers, passes)
    finally:
        if started:
            ray.shutdown()
    if screen is not None:
        screen.print(_table(result))
    return result


def _measure(total_bytes: int, workers: int, passes: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    store: Any = ray.remote(PolicyStore).options(num_cpus=0).remote(kept_versions=2)
    actor: Any = ray.remote(BenchWorker).options(num_cpus=0)
    group: list[Any] = [actor.remote(total_bytes) for _ in range(workers)]
    ray.get([worker.ready.remote() for worker in group], timeout=DEADLINE_S)
    tensors = lora_tensors(total_bytes, 1)
    buffer = encode_weights(tensors)
    bare: list[float] = []
    ours: dict[str, list[tuple[float, float]]] = {name: [] for name in TRANSPORTS}
    with TemporaryDirectory() as directory:
        places = Path(directory), store
        transports = {name: transport_of(name, *places) for name in TRANSPORTS}
        ray.get([worker.open.remote(*places) for worker in group], timeout=DEADLINE_S)
        for number in range(-2, passes):
            bare_s = _bare_pass(group, tensors, buffer)
            found = {}
            for name, transport in transports.items():
                found[name] = _our_pass(group, name, transport, tensors, number + 2)
            # The first two warm up processes, pages and connections.
            if number >= 0:
                bare.append(bare_s)
                for name, seconds in found.items():
                    ours[name].append(seconds)
        for transport in transports.values():
            transport.close()
    for handle in (*group, store):
        ray.kill(handle)
    result = {name: _summary(seconds, bare) for name, seconds in ours.items()}
    return {
        "benchmark": "weights",
        "bytes": int(buffer.size),
        "tensors": len(tensors),
        "workers": workers,
        "bare_s": statistics.median(bare),
        "transports": result,
        "target": TARGET,
        "met": result[TRANSPORTS[0]]["ratio"] <= TARGET,
    }


def _summary(ours: list[tuple[float, float]], bare: list[float]) -> dict[str, float]:
    ratios = [mine / theirs for (_, mine), theirs in zip(ours, bare, strict=True)]
    return {
        "ours_s": statistics.median(seconds for _, seconds in ours),
        "publish_s": statistics.median(seconds for seconds, _ in ours),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def _bare_pass(group: list[Any], tensors: dict[str, torch.Tensor], buffer: np.ndarray[Any, Any]) -> float:
    started = time.perf_counter()
    reference = ray.put(encode_weights(tensors, buffer))
    ray.get([worker.copy.remote([reference]) for worker in group], timeout=DEADLINE_S)
    return time.perf_counter() - started


def _our_pass(
    group: list[Any], name: str, transport: WeightsTransport, tensors: dict[str, torch.Tensor], step: int
) -> tuple[float, float]:
    started = time.perf_counter()
    announcement = publish(transport, tensors, PolicyVersion(epoch=0, step=step))
    publish_s = time.perf_counter() - started
    text = announcement.model_dump_json()
    bound = ray.get([worker.install.remote(name, text) for worker in group], timeout=DEADLINE_S)
    seconds = time.perf_counter() - started
    if set(bound) != {len(tensors)}:
        raise RuntimeError(f"{len(tensors)} tensors were published, {bound} were bound")
    return publish_s, seconds


def _table(result: dict[str, Any]) -> Table:
    size = f"{result['bytes'] / 1e6:.0f} MB in {result['tensors']} tensors"
    title = f"{size}, {result['workers']} workers; bare copies {result['bare_s'] * 1e3:.0f} ms"
    table = Table(title=title, title_justify="left")
    table.add_column("through")
    for heading in ("ours ms", "of which publish", "ratio (min-max)", "target"):
        table.add_column(heading, justify="right")
    for name, found in result["transports"].items():
        missed = "" if result["met"] else "  missed"
        table.add_row(
            name,
            f"{found['ours_s'] * 1e3:.0f}",
            f"{found['publish_s'] * 1e3:.0f}",
            f"{found['ratio']:.2f} ({found['ratio_min']:.2f}-{found['ratio_max']:.2f})",
            f"<= {result['target']:.2f}{missed}" if name == TRANSPORTS[0] else "-",
        )
    return table
