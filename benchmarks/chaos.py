"""Whole runs under a seeded schedule of faults, held against one that nobody disturbed.

Runs of the quickstart's model in a small configuration at `max_staleness: 0`, where the final weights are a
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
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.chaos_faults import CLOCK, DISK, FAULTS, RANKS, SERVE, FaultError, Flaky, Site, resumed
from benchmarks.chaos_machine import Clock, mount_small_disk, unmount
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
    "rollout.num_cpus=0.1",
    "objective.timesteps.first=4",
    "objective.timesteps.skip=0",
    "learner.micro_batch=4",
    "learner.num_cpus=0.1",
    "queue.max_staleness=0",
    "checkpoint.every_steps=2",
    "telemetry.tensorboard=false",
)
"""Overrides of a recipe: reproducible, and over in seconds an update. Tests of whole runs begin with them."""
UNDER_FAULTS: Final = (
    "rollout.workers=2",
    "rollout.max_restarts=1000",
    "rollout.hang_s=20",
    "learner.max_restarts=1000",
    f"learner.groups_per_step={GROUPS_PER_STEP}",
    "queue.lease_s=3",
    "queue.max_attempts=1000",
    "queue.max_dead=0",
    "eval.every_steps=0",
    "eval.final_prompts=2",
    "telemetry.samples_every=0",
    "telemetry.heartbeat_s=0.05",
)


@dataclass
class Injected:
    """One fault."""

    fault: str
    seconds: float
    """Until the next trained step."""
    aimed: bool
    """Whether it met what it was aimed at."""


@dataclass
class Disturbed:
    """One run from its start to its end."""

    digest: str
    trained: Counter[int]
    """Ordinal -> how often it was trained, in the surviving lineage."""
    untold: int
    """Groups of updates of which the row is lost: metrics wait in the queue for half a second."""
    dead: int
    injected: list[Injected]


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

    def give_back(self, fault: str) -> None:
        """It could not be seen what became of it: the run had ended."""
        self._order.append(fault)
        self._left += 1


def run_chaos_bench(
    screen: Console | None = None,
    *,
    minutes: float = 10.0,
    faults: Sequence[str] = (),
    seed: int = 0,
    steps: int = STEPS,
    most: int | None = None,
    runs: Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs until so many minutes are over; the last one is finished without more faults.

    Args:
        faults: names of benchmarks/chaos_faults.py `FAULTS`; none: all of them, those of a second rank where
            there is one.
        seed: of the order and the moments of the faults.
        steps: of a run.
        most: faults, in all; None: as many as there is time for.
        runs: where run directories are made; None: a temporary place, which keeps what went wrong. With
            `disk-full` it is a disk in memory, which `umount` frees.
        overrides: of all runs, `learner.publish_through=process_groups`, say.

    Returns:
        `faults` (by name: times, how often it met what it was aimed at, median and longest seconds),
        `injected`, `runs`, groups that were `lost`, `repeated` and `dead` by the ordinals of the updates,
        `equal` (whether every digest is that of the undisturbed run), `survived` (all is as it should be).

    Raises:
        ConfigError: a fault of an unknown name, or one that cannot be had here.
        FaultError: a run did not survive; the text names the fault and the run directory.
    """
    unknown = sorted(set(faults) - set(FAULTS))
    if unknown:
        raise ConfigError(f"--faults: unknown {', '.join(unknown)}; valid: {', '.join(FAULTS)}")
    one_rank = load_config("quickstart", list(overrides)).learner.ranks == 1
    if one_rank and (alone := sorted(RANKS & set(faults))):
        raise ConfigError(f"--faults: {', '.join(alone)} needs --set learner.ranks=2")
    chosen = tuple(faults) or tuple(fault for fault in FAULTS if not (one_rank and fault in RANKS))
    os.environ.setdefault(TOKEN_ENV, secrets.token_urlsafe(32))
    flaky = Flaky(create_app(ServerConfig(app="jpeg", token_env=TOKEN_ENV)))
    rng = random.Random(seed)
    place = runs or Path(tempfile.mkdtemp(prefix="dgpo-chaos-"))
    place.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if DISK & set(chosen):
            mount_small_disk(place)
        clock = None
        if CLOCK & set(chosen):
            clock = Clock(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        server = stack.enter_context(LocalServer(flaky))
        settings = _settings(server.url, place, steps, on_serve=bool(SERVE & set(chosen))) + list(overrides)
        settings += [f"queue.server={clock.server}"] if clock is not None else []
        _say(screen, f"a run that nobody disturbs, in {place}")
        # Of one worker: weights depend on their number as little as on faults.
        alone = [*settings, "rollout.workers=1"]
        undisturbed = _run(alone, flaky, clock, Schedule((), rng, 0.0), screen)
        schedule = Schedule(chosen, rng, time.monotonic() + 60 * minutes, most)
        disturbed = list[Disturbed]()
        while not disturbed or schedule.goes_on:
            disturbed.append(_run(settings, flaky, clock, schedule, screen))
            if runs is None and disturbed[-1].digest == undisturbed.digest:
                for finished in place.iterdir():
                    shutil.rmtree(finished)
    result = _summary(disturbed, undisturbed, steps) | {"seed": seed, "steps": steps}
    if runs is None and result["survived"]:
        if place.is_mount():
            unmount(place)
        shutil.rmtree(place)
    if screen is not None:
        screen.print(_table(result))
    return result


def _settings(url: str, place: Path, steps: int, *, on_serve: bool) -> list[str]:
    rewards = [f"{{name: size, url: '{url}', token_env: {TOKEN_ENV}, deadline_s: 4}}"]
    if on_serve:
        rewards.append("{name: served, app: jpeg, weight: 0.1, num_cpus: 0.05, deadline_s: 15}")
    own = [f"run.directory={place}", f"learner.max_steps={steps}", f"rewards=[{', '.join(rewards)}]"]
    return [*SMALL, *UNDER_FAULTS, *own]


def _run(
    settings: Sequence[str], flaky: Flaky, clock: Clock | None, schedule: Schedule, screen: Console | None
) -> Disturbed:
    directory = RunDirectory.create(load_config("quickstart", settings))

    def start() -> subprocess.Popen[str]:
        with (directory.logs / "chaos-driver.log").open("a") as log:
            return resumed(directory, stdout=subprocess.PIPE, stderr=log)

    site = Site(directory, flaky, start, start(), clock)
    injected: list[Injected] = []
    try:
        _next_step(site, 0.0, START_S, "the start")
        while schedule.goes_on and site.driver.poll() is None:
            time.sleep(schedule.rng.uniform(0.0, 1.0))
            if _steps_left(site) < SPARE_STEPS:
                break
            fault = schedule.next()
            aimed = FAULTS[fault](site, schedule.rng)
            began = time.time()
            row = _next_step(site, began, RECOVERY_S, fault)
            if row is None:
                schedule.give_back(fault)
                break
            injected.append(Injected(fault, row.time - began, aimed))
            missed = "" if aimed else " (aim missed)"
            _say(screen, f"  {fault}{missed}: next step after {row.time - began:.1f} s (step {row.step})")
        out, _ = site.driver.communicate(timeout=RECOVERY_S)
    except subprocess.TimeoutExpired:
        raise FaultError(f"the run in {directory.root} did not end within {RECOVERY_S:g} s") from None
    finally:
        if site.driver.poll() is None:
            site.driver.kill()
            site.driver.wait(START_S)
    if site.driver.returncode != 0:
        raise FaultError(f"the run in {directory.root} ended with exit code {site.driver.returncode}")
    digest = json.loads(out.strip().splitlines()[-1])["weights_digest"]
    written = read_metrics(directory.root)
    _say(screen, f"run over: {len(injected)} faults, digest {digest[:16]}")
    return Disturbed(
        digest,
        trained=Counter(ordinal for row in written.updates for ordinal in row.ordinals),
        untold=GROUPS_PER_STEP * (written.updates[-1].step - len(written.updates)),
        dead=sum(row.what == "dead letter" for row in written.events),
        injected=injected,
    )


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


def _summary(disturbed: Sequence[Disturbed], undisturbed: Disturbed, steps: int) -> dict[str, Any]:
    by_fault: dict[str, list[Injected]] = defaultdict(list)
    for one in disturbed:
        for injected in one.injected:
            by_fault[injected.fault].append(injected)
    wanted = range(steps * GROUPS_PER_STEP)
    lost = [sum(ordinal not in one.trained for ordinal in wanted) - one.untold for one in disturbed]
    found = {
        "lost": sum(lost),
        "repeated": sum(count - 1 for one in disturbed for count in one.trained.values()),
        "dead": sum(one.dead for one in disturbed),
    }
    equal = all(one.digest == undisturbed.digest for one in disturbed)
    return {
        "benchmark": "chaos",
        "faults": {
            fault: {
                "times": len(hits),
                "aimed": sum(hit.aimed for hit in hits),
                "median_s": statistics.median(hit.seconds for hit in hits),
                "longest_s": max(hit.seconds for hit in hits),
            }
            for fault, hits in sorted(by_fault.items())
        },
        "injected": sum(map(len, by_fault.values())),
        "runs": len(disturbed),
        **found,
        "untold": sum(one.untold for one in disturbed),
        "equal": equal,
        "survived": equal and not any(found.values()),
    }


def _table(result: dict[str, Any]) -> Table:
    told = "every digest is that of the undisturbed run" if result["equal"] else "DIGESTS DIFFER"
    title = (
        f"{result['injected']} faults in {result['runs']} runs; groups lost {result['lost']}, repeated "
        f"{result['repeated']}, dead {result['dead']}; {told}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("fault")
    for heading in ("times", "as aimed", "s to the next step, median", "longest"):
        table.add_column(heading, justify="right")
    for fault, found in result["faults"].items():
        counts = str(found["times"]), str(found["aimed"])
        table.add_row(fault, *counts, f"{found['median_s']:.1f}", f"{found['longest_s']:.1f}")
    return table


def _say(screen: Console | None, line: str) -> None:
    if screen is not None:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
