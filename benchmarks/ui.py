"""What the run page takes to answer for a long run: 100,000 updates, 10,000 kept groups.

A run directory is made up (no run takes part), the real page is served on loopback, and one client asks for
each address in turn, from a cold start: first while the metrics are still being read, then when they are.
Figures are of whole requests as the client sees them, an upper bound of the server's own time.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from reward_servers.local import LocalServer
from services.config_file import load_config
from services.images import write_strip
from services.metrics import EvalRow, Spread, UpdateRow
from services.run_directory import RunDirectory
from services.telemetry import METRICS_FILE
from services.ui.app import create_app
from services.ui.watch import Watch

TARGET_MS = 100.0
GROUP_SIZE = 16
TOKEN = "a-token-for-the-bench-only"
READING_DEADLINE_S = 600.0


def run_ui_bench(
    screen: Console | None = None, *, updates: int = 100_000, groups: int = 10_000, asks: int = 200
) -> dict[str, Any]:
    """Milliseconds by address.

    Args:
        asks: requests for each address once the metrics are read.

    Returns:
        `addresses`: name -> p50 and p99 in ms, bytes of an answer; `while_reading`: the same for what is
        asked again and again until the metrics are read; `reading_s`; `target_ms`, `met`.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), updates=updates, groups=groups)
        size = (run.root / METRICS_FILE).stat().st_size
        watch = Watch(run)
        other = RunDirectory.create(load_config("quickstart-guided", [f"run.directory={folder}"]))
        app = create_app(watch, token=TOKEN, compare={"other": other.root})
        headers = {"authorization": f"Bearer {TOKEN}"}
        with LocalServer(app) as server, httpx.Client(base_url=server.url, headers=headers) as client:
            began = time.perf_counter()
            early = _while_reading(client, watch)
            reading_s = time.perf_counter() - began
            found = {name: _asked(client, ask, asks) for name, ask in _addresses(client, updates).items()}
    result = {
        "benchmark": "ui",
        "updates": updates,
        "groups": groups,
        "metrics_bytes": size,
        "reading_s": reading_s,
        "while_reading": early,
        "addresses": found,
        "target_ms": TARGET_MS,
        "met": all(one["p99_ms"] < TARGET_MS for one in (*found.values(), *early.values())),
    }
    if screen is not None:
        screen.print(_table(result))
    return result


def make_run(folder: Path, *, updates: int, groups: int) -> RunDirectory:
    """A run directory as a long run leaves it, with one resume in its middle."""
    run = RunDirectory.create(load_config("quickstart", [f"run.directory={folder}"]))
    rng = random.Random(0)
    with (run.root / METRICS_FILE).open("w", encoding="utf-8") as file:
        for step in range(1, updates + 1):
            file.write(_update(step, updates, rng).model_dump_json() + "\n")
            if step % max(1, updates // 100) == 0:
                file.write(_evaluation(step, updates).model_dump_json() + "\n")
    pictures = []
    for number in range(min(groups, 8)):
        pictures.append(run.root / f"picture-{number}.png")
        pixels = np.random.default_rng(number).integers(0, 255, (GROUP_SIZE, 32, 64, 3), dtype=np.uint8)
        write_strip(pixels, pictures[-1])
    for number in range(groups):
        step = number * updates // groups
        place = run.samples / f"step-{step:06d}"
        place.mkdir(exist_ok=True)
        group = place / f"group-{number:06d}.json"
        shutil.copyfile(pictures[number % len(pictures)], group.with_suffix(".png"))
        group.write_text(json.dumps(_group(number, step, rng)))
    return run


def _update(step: int, last: int, rng: random.Random) -> UpdateRow:
    reward = 0.95 - 0.5 * math.exp(-8 * step / last) + rng.gauss(0, 0.02)
    return UpdateRow(
        time=1_700_000_000.0 + 5 * step,
        epoch=int(step > last // 2),
        step=step,
        max_steps=last,
        seconds=5 + rng.random(),
        reward_mean=reward,
        reward_std=0.1 + 0.02 * rng.random(),
        rewards={"ocr": Spread(mean=reward, std=0.1), "tesseract": Spread(mean=reward - 0.1, std=0.1)},
        staleness_mean=rng.random(),
        staleness_max=1,
        queue_depth=rng.randrange(9),
        groups=8 * step,
        images=8 * GROUP_SIZE * step,
        ordinals=tuple(range(8 * step - 8, 8 * step)),
        groups_per_s=1.5,
        loss=rng.random() / step,
        dsm=0.4 + 0.1 * rng.random(),
        grad_norm=rng.random(),
        group_weight=rng.random(),
        clip_fraction=rng.random() / 4,
        kl=rng.random() / 10,
        learning_rate=3e-4 * (1 - step / (last + 1)),
        micro_batch=16,
        phases={"wait_s": 1.0, "forward_backward_s": 3.5, "publish_s": 0.1, "commit_s": 0.05},
        rollout={"sample_s": 0.8, "reward_s": 0.4},
    )


def _evaluation(step: int, last: int) -> EvalRow:
    scores = {name: {"mean": 0.5, "se": 0.01} for name in ("ocr", "tesseract")}
    row = {"time": 1_700_000_000.0 + 5 * step, "step": step, "prompts": 64, "rewards": scores}
    return EvalRow.model_validate({**row, "epoch": int(step > last // 2)})


def _group(number: int, step: int, rng: random.Random) -> dict[str, Any]:
    scores = {name: [rng.random() for _ in range(GROUP_SIZE)] for name in ("ocr", "tesseract")}
    said = [{"text": f"K{number}", "exact": False} for _ in range(GROUP_SIZE)]
    return {
        "ordinal": number,
        "prompt": f'a sign that says "K{number}"',
        "version": f"0.{step}",
        "rewards": scores,
        "details": {"ocr": said},
    }


def _while_reading(client: httpx.Client, watch: Watch) -> dict[str, Any]:
    """What a page asks for that is opened at once; until all is read."""
    asked = {"status": "/api/status", "the page": "/", "groups": "/api/groups"}
    spent: dict[str, list[float]] = {name: [] for name in asked}
    give_up = time.monotonic() + READING_DEADLINE_S
    while watch.look().reading is not None:
        if time.monotonic() > give_up:
            raise TimeoutError(f"the metrics were not read within {READING_DEADLINE_S:g} s")
        for name, address in asked.items():
            spent[name].append(_once(lambda address=address: client.get(address))[0])  # type: ignore[misc]
    return {name: _spread(times) for name, times in spent.items()}


def _addresses(client: httpx.Client, updates: int) -> dict[str, Callable[[], httpx.Response]]:
    key = client.get("/api/groups?count=1").json()["groups"][0]["key"]
    total = client.get("/api/groups?count=1").json()["total"]
    plain = {
        "the page": "/",
        "status": "/api/status",
        "which charts": "/api/charts",
        "curves of the reward, again": "/api/charts/reward",
        "held-out scores": "/api/charts/heldout",
        "events and times": "/api/told",
        "newest groups": "/api/groups?count=12",
        "groups in the middle": f"/api/groups?count=12&first={total // 2}",
        "groups of a step": f"/api/groups?count=12&step={updates // 3}",
        "an image": f"/api/groups/{key}/0",
        "configuration": "/api/config?against=other",
    }
    places = iter(range(10**9))

    def fresh_curves(key: str, last: int) -> httpx.Response:
        """From another step on each time: worked out anew."""
        return client.get(f"/api/charts/{key}?first={1 + next(places)}&last={last}")

    def fresh_image() -> httpx.Response:
        """Of another group each time: decoded anew."""
        group = client.get(f"/api/groups?count=1&first={next(places) % total}").json()["groups"][0]["key"]
        return client.get(f"/api/groups/{group}/3")

    asks: dict[str, Callable[[], httpx.Response]] = {
        name: (lambda address=address: client.get(address))  # type: ignore[misc]
        for name, address in plain.items()
    }
    return {
        **asks,
        "curves of the reward, anew": lambda: fresh_curves("reward", updates),
        "curves of a tenth, anew": lambda: fresh_curves("reward", updates // 10),
        "one curve, anew": lambda: fresh_curves("loss", updates),
        "a group and a new image": fresh_image,
        "first news of the stream": lambda: _first(client),
    }


def _first(client: httpx.Client) -> httpx.Response:
    with client.stream("GET", "/api/stream") as answer:
        lines = answer.iter_lines()
        while not next(lines).startswith("event: groups"):
            pass
        return answer


def _asked(client: httpx.Client, ask: Callable[[], httpx.Response], asks: int) -> dict[str, Any]:
    spent, answer = zip(*(_once(ask) for _ in range(asks)), strict=True)
    return {**_spread(list(spent)), "bytes": int(answer[-1].headers.get("content-length", 0))}


def _once(ask: Callable[[], httpx.Response]) -> tuple[float, httpx.Response]:
    began = time.perf_counter()
    answer = ask()
    spent = time.perf_counter() - began
    answer.raise_for_status()
    return 1000 * spent, answer


def _spread(times: list[float]) -> dict[str, Any]:
    ordered = sorted(times)
    return {
        "p50_ms": statistics.median(ordered),
        "p99_ms": ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)],
        "asks": len(ordered),
    }


def _table(result: dict[str, Any]) -> Table:
    title = (
        f"Run page: {result['updates']:,} updates ({result['metrics_bytes'] / 1e6:.0f} MB, read in "
        f"{result['reading_s']:.1f} s), {result['groups']:,} groups"
    )
    table = Table(title=title)
    table.add_column("asked for")
    for name in ("p50, ms", "p99, ms", "asks", "answer, kB"):
        table.add_column(name, justify="right")
    rows = [(f"{name}, while it reads", one) for name, one in result["while_reading"].items()]
    for name, one in [*rows, *result["addresses"].items()]:
        shown = f"{one['bytes'] / 1000:.1f}" if one.get("bytes") else "-"
        table.add_row(name, f"{one['p50_ms']:.1f}", f"{one['p99_ms']:.1f}", f"{one['asks']:,}", shown)
    table.add_row("target", "", f"{result['target_ms']:.0f}", "met" if result["met"] else "missed", "")
    return table
