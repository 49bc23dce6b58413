"""`dgpo status` and `dgpo scale`: how a run is, asked of its queue and directory from beside it.

Promises
- Status reads only: a run that is looked at does not change, and goes on when this fails.
- Says of a part that waits what it waits for and since when, and names the parts that have gone silent.
- A run whose queue is gone is told by what its directory has: how far it came, and how to go on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import redis
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.config import Config, QueuePart
from services.config_file import ConfigError
from services.context import RunContext, SecretPlace, queue_authority
from services.embedded import EmbeddedServerError, EmbeddedValkey
from services.formatting import duration, number, size
from services.group_queue import GroupQueue, QueueUnreachable
from services.messages import DeadLetter, Heartbeat, Message, PolicyVersion
from services.metrics import EvalRow, UpdateRow
from services.prompts import evaluates
from services.queue_types import QueueStatus
from services.run_directory import RunDirectory
from services.telemetry import read_metrics

SHOWN_LETTERS = 5
WATCH_S = 2.0


Beats = dict[str, Heartbeat | None]
"""Part -> its last heartbeat; None for one that has fallen silent."""


class Flow(Message):
    """The group queue, at one moment."""

    depth: int
    """Groups that wait to be trained."""
    bytes: int
    issued: int
    """Ordinals that workers hold."""
    window: int
    """Ordinals that may be issued or waiting at once; 0 before the learner has begun."""
    trained: int
    of: int
    dead: int


class RunStatus(Message):
    """How a run is."""

    run: str
    state: str
    """starting, running, degraded, draining, done, failed; with its queue gone: done, stopped, or, while its
    driver is still there, ending."""
    reason: str
    """Why it is in that state; may be empty."""
    driver: int | None
    """Process that holds the run directory; None where it is not on this machine."""
    step: int
    max_steps: int
    update: UpdateRow | None
    """The last one that is written down."""
    evaluation: EvalRow | None
    version: PolicyVersion | None = None
    flow: Flow | None = None
    workers_wanted: int | None = None
    parts: tuple[Heartbeat, ...] = ()
    silent: tuple[str, ...] = ()
    """Parts whose heartbeat has stopped."""
    dead_letters: tuple[DeadLetter, ...] = ()

    @property
    def workers(self) -> int:
        """Rollout workers that have been heard of lately."""
        return sum(beat.part.startswith("rollout-") for beat in self.parts)


def run_status(run: RunDirectory) -> RunStatus:
    """Ask once.

    Raises:
        ConfigError: the configuration of the run cannot be read, or the secret of its queue.
        QueueUnreachable: a queue server that is not the run's own does not answer.
    """
    written = read_metrics(run.root)
    return status_with(
        run,
        update=written.last_update,
        evaluation=written.evals[-1] if written.evals else None,
    )


def status_with(run: RunDirectory, *, update: UpdateRow | None, evaluation: EvalRow | None) -> RunStatus:
    """The same, for one who has the newest rows of the run.

    Raises:
        ConfigError, QueueUnreachable: as `run_status`.
    """
    config = run.config()
    step, driver = _step(update), run.driver()
    found = _ask(run, config)
    state, reason = _without_queue(run, config, step, driver) if found is None else _state(*found[:2])
    seen = RunStatus(
        run=run.name,
        state=state,
        reason=reason,
        driver=driver,
        step=step,
        max_steps=config.learner.max_steps,
        update=update,
        evaluation=evaluation,
    )
    if found is None:
        return seen
    queue, beats, letters, wanted = found
    return seen.model_copy(
        update={
            "version": queue.version,
            "flow": Flow(
                depth=queue.depth,
                bytes=queue.bytes,
                issued=len(queue.leases),
                window=queue.window,
                trained=queue.trained,
                of=queue.limit,
                dead=queue.dead,
            ),
            "workers_wanted": None if config.offline else wanted,
            "parts": tuple(beat for _, beat in sorted(beats.items()) if beat is not None),
            "silent": _silent(beats),
            "dead_letters": tuple(letters),
        }
    )


def _state(queue: QueueStatus, beats: Beats) -> tuple[str, str]:
    """State and reason, of a run whose queue answers."""
    silent = _silent(beats)
    if queue.state in ("starting", "running") and silent:
        return "degraded", f"no heartbeat of {', '.join(silent)}"
    return queue.state or "starting", queue.reason


def _step(update: UpdateRow | None) -> int:
    return update.step if update is not None else 0


def _without_queue(run: RunDirectory, config: Config, step: int, driver: int | None) -> tuple[str, str]:
    """State and reason, of a run whose queue has ended with it or is not there yet."""
    if driver is not None:
        return ("ending" if step else "starting"), ""
    if step >= config.learner.max_steps:
        return "done", ""
    host = run.driver_elsewhere()
    ask = f"its driver was on {host}: if it still is, ask there; else " if host else ""
    return "stopped", f"{ask}go on with: dgpo train --resume {run.root}"


def _silent(beats: Beats) -> tuple[str, ...]:
    return tuple(sorted(part for part, beat in beats.items() if beat is None))


def _ask(run: RunDirectory, config: Config) -> tuple[QueueStatus, Beats, list[DeadLetter], int | None] | None:
    """What the queue says; None where the server was the run's own and has ended with it."""
    try:
        queue = _open(run, config, "observer")
        return queue.status(), queue.heartbeats(), queue.dead_letters(), queue.wanted_workers()
    except (EmbeddedServerError, QueueUnreachable, redis.RedisError):
        if config.queue.url is not None:
            raise
        return None


def scale_run(
    run: RunDirectory, workers: int | None = None, replicas: Mapping[str, int] | None = None
) -> None:
    """Tell the driver of a run how many rollout workers, and replicas of its rewards, it shall keep.

    Raises:
        ConfigError: it is not running, has no rollout workers, or has not started such a reward.
        QueueUnreachable, redis.RedisError: its queue server does not answer, or not to this login.
    """
    config = run.config()
    if config.offline and workers is not None:
        raise ConfigError(f"{run.root}: it trains from a recording, by one feeder; there is nothing to scale")
    served = not config.offline or evaluates(config)
    own = [reward.name for reward in config.rewards if reward.app is not None and served]
    for name in replicas or {}:
        if name not in own:
            raise ConfigError(
                f"{run.root}: reward {name!r} is none that the run has started; those are: "
                f"{', '.join(own) or 'none'} (one with a url is scaled where it is served)"
            )
    try:
        queue = _open(run, config, "driver")
    except (EmbeddedServerError, QueueUnreachable) as error:
        if config.queue.url is not None:
            raise
        step = _step(read_metrics(run.root).last_update)
        seen, reason = _without_queue(run, config, step, run.driver())
        raise ConfigError(
            f"{run.root}: the run is {seen}, its queue hears nothing: {reason or error}"
        ) from error
    state = queue.state()
    if state not in ("starting", "running", "degraded"):
        raise ConfigError(f"{run.root}: the run is {state or 'not there'}; only one that goes on is scaled")
    if workers is not None and workers != 1 and config.cluster.colocate:
        raise ConfigError(f"{run.root}: cluster.colocate: the card is for one rollout worker, not {workers}")
    if workers is not None:
        queue.want_workers(workers)
    for name, count in (replicas or {}).items():
        queue.want_replicas(name, count)


def _open(run: RunDirectory, config: Config, part: QueuePart) -> GroupQueue:
    url, password = config.queue.url, SecretPlace(env=config.queue.password_env)
    if url is None:
        url, _ = EmbeddedValkey.join(run.queue)
        password = SecretPlace(file=run.queue / "password")
    context = RunContext(
        run=run.name,
        directory=run.root,
        config=config,
        queue_url=url,
        queue_password=password,
        queue_authority=queue_authority(config),
    )
    return context.open_queue(part)


def drawn(status: RunStatus, now: float | None = None) -> RenderableType:
    """For a terminal; text from elsewhere is shown as text."""
    now = time.time() if now is None else now
    shown: list[RenderableType] = [_head(status)]
    if status.reason:
        shown.append(Text(status.reason, style="yellow"))
    if status.flow is not None and status.flow.window:
        shown.append(Text(_flow(status.flow)))
    if status.update is not None:
        shown.append(Text(_update(status.update, now)))
    if status.evaluation is not None:
        scores = status.evaluation.rewards.items()
        means = "  ".join(f"{name} {number(score.mean)} ± {number(score.se)}" for name, score in scores)
        shown.append(Text(f"evaluated at step {status.evaluation.step}: {means}"))
    if status.workers < (status.workers_wanted or 0):
        missing = (
            f"{status.workers} of {status.workers_wanted} rollout workers: others start, or wait for room"
        )
        shown.append(Text(missing))
    if status.parts:
        shown.append(_parts(status, now))
    for letter in status.dead_letters[-SHOWN_LETTERS:]:
        shown.append(Text(f"given up: ordinal {letter.ordinal}: {letter.reason}", style="yellow"))
    return Group(*shown)


def watched(run: RunDirectory, screen: Console) -> None:
    """Draw it again and again, until Ctrl-C or the end of the run."""
    with Live(console=screen, auto_refresh=False) as live:
        while True:
            found = run_status(run)
            live.update(drawn(found), refresh=True)
            if found.state in ("done", "failed", "stopped"):
                return
            time.sleep(WATCH_S)


_STYLES = {"running": "green", "done": "green", "failed": "red", "degraded": "yellow"}


def _head(status: RunStatus) -> Text:
    head = Text(f"{status.run}  ", style="bold")
    head.append(status.state, style=_STYLES.get(status.state, "cyan"))
    head.append(f"  {status.step}/{status.max_steps} updates", style="not bold")
    if status.version is not None:
        head.append(f"  version {status.version}", style="not bold")
    return head


def _flow(flow: Flow) -> str:
    return (
        f"{flow.trained}/{flow.of} groups trained, {flow.depth} waiting ({size(flow.bytes)}), "
        f"{flow.issued} being sampled, {flow.window} at most; {flow.dead} given up"
    )


def _update(row: UpdateRow, now: float) -> str:
    return (
        f"last update {row.step}, {duration(max(0.0, now - row.time))} ago: reward {number(row.reward_mean)} "
        f"± {number(row.reward_std)}, {row.seconds:.1f} s"
    )


def _parts(status: RunStatus, now: float) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("part", "doing", "for", "version", "groups", "memory", "node, pid"):
        table.add_column(title, justify="right" if title in ("for", "groups", "memory") else "left")
    for beat in status.parts:
        table.add_row(
            Text(beat.part),
            Text(beat.state if beat.ordinal is None else f"{beat.state} (ordinal {beat.ordinal})"),
            duration(max(0.0, now - beat.since)),
            "-" if beat.version is None else str(beat.version),
            str(beat.groups),
            size(beat.rss_bytes),
            Text(f"{beat.node}, {beat.pid}"),
        )
    for part in status.silent:
        table.add_row(Text(part, style="yellow"), Text("silent", style="yellow"), *["-"] * 5)
    return table
