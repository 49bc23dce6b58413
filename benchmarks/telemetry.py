"""What watching a run costs, against what an update of the quickstart costs: CPU seconds of both.

First a real quickstart runs for some updates, and the CPU seconds of all its processes are read between two
of them. Then everything that is done to watch it is done again, many times over, with a row of that run,
against a real queue server and a real Ray: rows and heartbeats sent and read, metrics.jsonl, TensorBoard,
Ray's metrics, the view, kept images. Each is counted as often as an update has it.

Seconds of CPU, not of the clock: they hold on a machine that has other work too, and count what happens in
other threads. Not counted is what Ray's own agent does with metrics, which it collects whether or not a run
has any.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import ray
from rich.console import Console
from rich.table import Table

from services.config import Config
from services.config_file import PROJECT_ROOT, load_config
from services.embedded import EmbeddedValkey
from services.group_queue import GroupQueue, connect
from services.heartbeat import Pulse
from services.images import write_strip
from services.messages import Heartbeat, PolicyVersion
from services.metrics import UpdateRow, row_of
from services.monitor import POLL_S
from services.progress import Progress
from services.ray_metrics import RewardMetrics, RunMetrics
from services.ray_runtime import start_on_loopback
from services.telemetry import Telemetry, read_metrics

TARGET: Final = 0.01
DEADLINE_S: Final = 900.0
FIRST: Final = 3
"""Updates that are left out: the parts are still starting, and the evaluation before training goes on."""
TIMES: Final = 500
PASSES: Final = 3

Costs = dict[str, tuple[float, float]]
"""What -> CPU seconds of one, and how many an update has."""


def run_telemetry_bench(
    screen: Console | None = None, *, updates: int = 12, times: int = TIMES
) -> dict[str, Any]:
    """CPU seconds an update.

    Args:
        updates: of the quickstart that is run; those behind the third are measured.
        times: how often each cost is paid to measure it.

    Returns:
        `costs`: name -> `cpu_s` of one, `per_update`; `telemetry_cpu_s` and `update_cpu_s` of an update,
        `update_s` on the clock; `ratio`, `target`, `met`.

    Raises:
        RuntimeError: the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        row, update_s, update_cpu_s = _update_costs(Path(folder) / "runs", updates)
        costs = telemetry_costs(Path(folder), load_config("quickstart"), row, update_s, times)
    telemetry_cpu_s = sum(cpu_s * count for cpu_s, count in costs.values())
    result = {
        "benchmark": "telemetry",
        "updates": updates - FIRST,
        "update_s": update_s,
        "update_cpu_s": update_cpu_s,
        "costs": {name: {"cpu_s": cpu_s, "per_update": count} for name, (cpu_s, count) in costs.items()},
        "telemetry_cpu_s": telemetry_cpu_s,
        "ratio": telemetry_cpu_s / update_cpu_s,
        "target": TARGET,
        "met": telemetry_cpu_s < TARGET * update_cpu_s,
    }
    if screen is not None:
        screen.print(_table(result))
    return result


def _update_costs(runs: Path, updates: int) -> tuple[UpdateRow, float, float]:
    """The last row of a real run; seconds of an update on the clock, and of all processes' CPUs."""
    settings = [
        *(f"run.directory={runs}", f"learner.max_steps={updates}", "eval.every_steps=0"),
        *("eval.prompts=1", "eval.final_prompts=1"),
    ]
    command = [sys.executable, "-m", "services.train", "--config", "quickstart"]
    command += [word for setting in settings for word in ("--set", setting)]
    with tempfile.TemporaryFile("w+") as log:
        running = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=log, stderr=log)
        try:
            marks: list[tuple[float, float]] = []
            for step in (FIRST, updates):
                _await_step(runs, step, running)
                marks.append((time.monotonic(), _cpu_s(running.pid)))
            (root,) = runs.iterdir()
            row = read_metrics(root).updates[-1]
        except RuntimeError as error:
            log.seek(0)
            raise RuntimeError(f"{error}\n{log.read()}") from None
        finally:
            _kill(running)
    (began, cpu_began), (ended, cpu_ended) = marks
    count = updates - FIRST
    return row, (ended - began) / count, (cpu_ended - cpu_began) / count


def _await_step(runs: Path, step: int, running: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + DEADLINE_S
    while True:
        roots = list(runs.iterdir()) if runs.is_dir() else []
        last = read_metrics(roots[0]).last_update if roots else None
        if last is not None and last.step >= step:
            return
        if running.poll() is not None or time.monotonic() > give_up:
            raise RuntimeError(f"the quickstart did not come to update {step}")
        time.sleep(0.1)


def _cpu_s(pid: int) -> float:
    """Of a process and all below it."""
    whole = psutil.Process(pid)
    seconds = 0.0
    for process in (whole, *whole.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            used = process.cpu_times()
            seconds += used.user + used.system
    return seconds


def _kill(running: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        whole = psutil.Process(running.pid)
        for process in (*whole.children(recursive=True), whole):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    running.wait(timeout=60)


def telemetry_costs(folder: Path, config: Config, row: UpdateRow, update_s: float, times: int) -> Costs:
    """Each with a real queue server and a real Ray."""
    with EmbeddedValkey(folder / "queue") as server, _ray():
        queue = GroupQueue(connect(server.url, server.password), "bench", config.queue)
        watched = [psutil.Process(server.pid)] if server.pid is not None else []
        metrics = RunMetrics("bench", [reward.name for reward in config.rewards])
        asked = RewardMetrics("bench").asked
        view = Progress("bench", row.max_steps, console=Console(file=(folder / "screen").open("w")))
        parts = ["learner-0", *(f"rollout-{index}" for index in range(config.rollout.workers)), "evaluator"]
        pulses = [Pulse(part, lambda beat: queue.beat(beat, 60.0)) for part in parts]
        beats = [Heartbeat(part=part, state="sampling", since=time.time(), rss_bytes=1) for part in parts]
        fields, version = row.model_dump(), PolicyVersion(epoch=0, step=row.step)
        size = (config.rollout.group_size, config.model.height, config.model.width, 3)
        images = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)
        groups = config.learner.groups_per_step
        queue.append_metrics(fields)

        def read_row() -> None:
            row_of(queue.read_metrics(count=1)[0][1])
            queue.metrics_written("1-0")

        def beat() -> None:
            pulses[0].enter("sampling", ordinal=int(time.time_ns()))
            queue.beat(pulses[0].snapshot(), 60.0)

        def keep() -> None:
            write_strip(images, folder / "group.png")
            (folder / "group.json").write_text(json.dumps({"rewards": {"ocr": [0.5] * len(images)}}))

        def turn() -> None:
            queue.heartbeats()
            queue.latest("policy")
            metrics.beats(beats, version)
            metrics.state("running")
            view.heartbeats(beats)

        with Telemetry(folder, tensorboard=False) as rows, Telemetry(folder / "both") as both:
            measured: dict[str, tuple[Callable[[], object], float]] = {
                "the learner makes and sends the row": (lambda: queue.append_metrics(row.model_dump()), 1),
                "the driver reads it": (read_row, 1),
                "metrics.jsonl": (lambda: rows.write(row), 1),
                "metrics.jsonl and TensorBoard": (lambda: both.write(row), 1),
                "Ray's metrics of the row": (lambda: metrics.add(row), 1),
                "the line on the screen": (lambda: view.row(row), 1),
                "a heartbeat": (beat, len(parts) * update_s / config.telemetry.heartbeat_s),
                "the driver looks at heartbeats": (turn, update_s / POLL_S),
                "Ray's metrics of a reward's request": (lambda: asked("ocr", 0.1, None), groups + 1),
                "images of a group are kept": (keep, 1 / config.telemetry.samples_every),
            }
            costs = {name: (_cost(do, times, watched), count) for name, (do, count) in measured.items()}
    whole, count = costs.pop("metrics.jsonl and TensorBoard")
    costs["TensorBoard"] = (max(0.0, whole - costs["metrics.jsonl"][0]), count)
    return costs


def _cost(do: Callable[[], object], times: int, beside: list[psutil.Process]) -> float:
    """CPU seconds of one, of this process with all its threads and of those beside it: the least of some."""

    def used() -> float:
        others = (process.cpu_times() for process in beside)
        return time.process_time() + sum(one.user + one.system for one in others)

    found = []
    for _ in range(PASSES):
        began = used()
        for _ in range(times):
            do()
        found.append((used() - began) / times)
    return min(found)


@contextmanager
def _ray() -> Iterator[None]:
    started = not ray.is_initialized()
    if started:
        start_on_loopback(1, object_store_bytes=100 * 1024**2)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"Watching a run: CPU, beside an update of the quickstart ({result['updates']} of them)"
    )
    table.add_column("what")
    for name in ("ms of one", "an update has", "ms an update"):
        table.add_column(name, justify="right")
    for name, cost in result["costs"].items():
        ms = cost["cpu_s"] * 1000
        table.add_row(name, f"{ms:.3f}", f"{cost['per_update']:.1f}", f"{ms * cost['per_update']:.2f}")
    table.add_section()
    table.add_row("all of it", "", "", f"{result['telemetry_cpu_s'] * 1000:.1f}")
    table.add_row(
        f"an update, {result['update_s']:.1f} s on the clock", "", "", f"{result['update_cpu_s'] * 1000:,.0f}"
    )
    table.add_row("share", "", "", f"{result['ratio']:.2%}")
    table.add_row("target", "", "met" if result["met"] else "missed", f"{result['target']:.0%}")
    return table
