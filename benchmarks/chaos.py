"""Whole runs under a seeded schedule of faults, held against one that nobody disturbed.

Rounds of the quickstart's model in a small configuration at `max_staleness: 0`, where the final weights are a
pure function of configuration and seed: a group that was lost, trained twice, or sampled with other weights
than it should have been gives another digest. Parts are hit by real signals, from outside, in a run with
processes of its own (embedded queue, Ray, Ray Train; Ray Serve where a fault needs it). One fault at a time:
the next comes once the run has trained a further step.

Seconds count from the signal (of a fault that lasts, from its end) to the end of the next update.
"""

from __future__ import annotations

import json
import math
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.chaos_faults import FAULTS, SERVE, FaultError, Flaky, Site
from reward_servers.app import create_app
from reward_servers.local import LocalServer
from reward_servers.server_config import ServerConfig
from services.config_file import ConfigError, load_config
from services.metrics import UpdateRow
from services.run_directory import RunDirectory
from services.telemetry import read_metrics

STEPS: Final = 150
GROUPS_PER_STEP: Final = 2
RECOVERY_S: Final = 240.0
"""A run that has not trained a step for this long after a fault has not survived it."""
START_S: Final = 300.0
SPARE_STEPS: Final = 3
"""A run that has fewer left is let end: there must be a step that shows that it goes on."""
POLL_S: Final = 0.05
TOKEN_ENV: Final = "DGPO_CHAOS_REWARD_TOKEN"
SMALL: Final = (
    "rollout.group_size=4",
    "rollout.steps=4",
    "rollout.workers=2",
    "rollout.num_cpus=0.1",
    "rollout.max_restarts=1000",
    "objective.timesteps.first=4",
    "objective.timesteps.skip=0",
    "learner.micro_batch=4",
    "learner.num_cpus=0.1",
    "learner.max_restarts=1000",
    f"learner.groups_per_step={GROUPS_PER_STEP}",
    "queue.max_staleness=0",
    "queue.lease_s=3",
    "queue.max_attempts=1000",
    "queue.max_dead=0",
    "checkpoint.every_steps=2",
    "eval.every_steps=0",
    "eval.final_prompts=2",
    "telemetry.tensorboard=false",
    "telemetry.samples_every=0",
    "telemetry.heartbeat_s=0.05",
)


@dataclass
class Injected:
    """One fault."""

    fault: str
    seconds: float
    """Until the next trained step."""


@dataclass
class Round:
    """One run from start to end."""

    digest: str
    groups: int
    dead: int
    injected: list[Injected] = field(default_factory=list)


class Schedule:
    """Which fault comes next: all of them in random order, and again.

    Args:
        until: no fault comes after this (monotonic).
        most: nor after so many.
    """

    def __init__(
        self, faults: Sequence[str], rng: random.Random, until: float, most: int | None = None
    ) -> None:
        self.rng = rng
        self._faults, self._until, self._left = list(faults), until, math.inf if most is None else most
        self._order: list[str] = []

    @property
    def goes_on(self) -> bool:
        return self._left > 0 and time.monotonic() < self._until

    def next(self) -> str:
        self._order = self._order or self.rng.sample(self._faults, len(self._faults))
        self._left -= 1
        return self._order.pop()


def run_chaos_bench(
    screen: Console | None = None,
    *,
    minutes: float = 10.0,
    faults: Sequence[str] = (),
    seed: int = 0,
    steps: int = STEPS,
    most: int | None = None,
    runs: Path | None = None,
) -> dict[str, Any]:
    """Rounds until so many minutes are over; the last one is finished without more faults.

    Args:
        faults: names of benchmarks/chaos_faults.py `FAULTS`; none: all of them.
        seed: of the order and the moments of the faults.
        steps: of a run.
        most: faults, in all; None: as many as there is time for.
        runs: where run directories are made; None: a temporary place.

    Returns:
        `faults` (by name: times, median and longest seconds), `injected`, `rounds`, groups that were `lost`,
        `repeated` and `dead`, `equal` (whether every digest is that of the undisturbed run).

    Raises:
        ConfigError: a fault of an unknown name.
        FaultError: a run did not survive; the text names the fault and the run directory.
    """
    unknown = sorted(set(faults) - set(FAULTS))
    if unknown:
        raise ConfigError(f"--faults: unknown {', '.join(unknown)}; valid: {', '.join(FAULTS)}")
    chosen = tuple(faults) or tuple(FAULTS)
    os.environ.setdefault(TOKEN_ENV, secrets.token_urlsafe(32))
    flaky = Flaky(create_app(ServerConfig(app="jpeg", token_env=TOKEN_ENV)))
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary, LocalServer(flaky) as server:
        place = runs or Path(temporary)
        settings = _settings(server.url, place, steps, on_serve=bool(SERVE & set(chosen)))
        _say(screen, "a run that nobody disturbs")
        # Of one worker: weights depend on their number as little as on faults.
        alone = [*settings, "rollout.workers=1"]
        undisturbed = _round(alone, flaky, Schedule((), rng, 0.0), screen)
        schedule = Schedule(chosen, rng, time.monotonic() + 60 * minutes, most)
        rounds = list[Round]()
        while not rounds or schedule.goes_on:
            rounds.append(_round(settings, flaky, schedule, screen))
    result = _summary(rounds, undisturbed, steps * GROUPS_PER_STEP) | {"seed": seed, "steps": steps}
    if screen is not None:
        screen.print(_table(result))
    return result


def _settings(url: str, place: Path, steps: int, *, on_serve: bool) -> list[str]:
    rewards = [f"{{name: size, url: '{url}', token_env: {TOKEN_ENV}, deadline_s: 4}}"]
    if on_serve:
        rewards.append("{name: served, app: jpeg, weight: 0.1, num_cpus: 0.05, deadline_s: 60}")
    own = [f"run.directory={place}", f"learner.max_steps={steps}", f"rewards=[{', '.join(rewards)}]"]
    return [*SMALL, *own]


def _round(settings: Sequence[str], flaky: Flaky, schedule: Schedule, screen: Console | None) -> Round:
    directory = RunDirectory.create(load_config("quickstart", settings))

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "services.cli", "train", "--resume", str(directory.root), "--json"]
        with (directory.logs / "chaos-driver.log").open("a") as log:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)

    site = Site(directory, flaky, start, start())
    injected: list[Injected] = []
    try:
        _next_step(site, 0.0, START_S, "the start")
        while schedule.goes_on and site.driver.poll() is None:
            time.sleep(schedule.rng.uniform(0.0, 1.0))
            if _steps_left(site) < SPARE_STEPS:
                break
            fault = schedule.next()
            FAULTS[fault](site, schedule.rng)
            began = time.time()
            row = _next_step(site, began, RECOVERY_S, fault)
            if row is None:
                break
            injected.append(Injected(fault, row.time - began))
            _say(screen, f"  {fault}: next step after {row.time - began:.1f} s (step {row.step})")
        out, _ = site.driver.communicate(timeout=RECOVERY_S)
    finally:
        if site.driver.poll() is None:
            site.driver.kill()
            site.driver.wait(START_S)
    if site.driver.returncode != 0:
        raise FaultError(f"the run in {directory.root} ended with exit code {site.driver.returncode}")
    result = json.loads(out.strip().splitlines()[-1])
    dead = [row for row in read_metrics(directory.root).events if row.what == "dead letter"]
    _say(screen, f"run over: {len(injected)} faults, digest {result['weights_digest'][:16]}")
    return Round(result["weights_digest"], result["groups"], len(dead), injected)


def _steps_left(site: Site) -> int:
    rows = read_metrics(site.directory.root).updates
    return site.directory.config().learner.max_steps - (rows[-1].step if rows else 0)


def _next_step(site: Site, since: float, deadline_s: float, behind: str) -> UpdateRow | None:
    """The first update that ended after this time (Unix); None if the run has ended well meanwhile."""
    give_up = time.monotonic() + deadline_s
    while time.monotonic() < give_up:
        rows = [row for row in read_metrics(site.directory.root).updates if row.time > since]
        if rows:
            return rows[0]
        code = site.driver.poll()
        if code == 0:
            return None
        if code is not None:
            raise FaultError(f"{behind}: the run in {site.directory.root} ended with exit code {code}")
        time.sleep(POLL_S)
    raise FaultError(f"{behind}: no step within {deadline_s:g} s in {site.directory.root}")


def _summary(rounds: Sequence[Round], undisturbed: Round, groups: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = defaultdict(list)
    for one in rounds:
        for injected in one.injected:
            seconds[injected.fault].append(injected.seconds)
    return {
        "benchmark": "chaos",
        "faults": {
            fault: {"times": len(found), "median_s": statistics.median(found), "longest_s": max(found)}
            for fault, found in sorted(seconds.items())
        },
        "injected": sum(map(len, seconds.values())),
        "rounds": len(rounds),
        "lost": sum(max(0, groups - one.groups) for one in rounds),
        "repeated": sum(max(0, one.groups - groups) for one in rounds),
        "dead": sum(one.dead for one in rounds),
        "equal": all(one.digest == undisturbed.digest for one in rounds),
    }


def _table(result: dict[str, Any]) -> Table:
    told = "every digest is that of the undisturbed run" if result["equal"] else "DIGESTS DIFFER"
    title = (
        f"{result['injected']} faults in {result['rounds']} runs; groups lost {result['lost']}, repeated "
        f"{result['repeated']}, dead {result['dead']}; {told}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("fault")
    for heading in ("times", "s to the next step, median", "longest"):
        table.add_column(heading, justify="right")
    for fault, found in result["faults"].items():
        table.add_row(fault, str(found["times"]), f"{found['median_s']:.1f}", f"{found['longest_s']:.1f}")
    return table


def _say(screen: Console | None, line: str) -> None:
    if screen is not None:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
