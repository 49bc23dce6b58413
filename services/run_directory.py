"""The run directory: everything that outlives the processes of a run.

Layout
    config.yaml        the resolved configuration; former ones of a resumed run: config.yaml.before-N
    environment.json   versions, git revision, machine
    epoch.json         the newest epoch, which never begins again (learner/epochs.py)
    micro_batch.json   what `learner.micro_batch: auto` has found, and the run keeps to
    metrics.jsonl      one row an update, an evaluation, an event
    tensorboard/       the same as event files
    samples/           images of some groups, and of the evaluations before and after
    groups/            the groups that were trained, with telemetry.record (services/recording.py)
    checkpoints/       step-N/, manifest written last
    queue/             the embedded Valkey's append-only file
    secrets/           tokens, readable by the owner alone; never copied into a report
    logs/              one file a part
    export/            the trained model, for stock diffusers
    evaluations/       of suites of prompts (services/suites/folder.py)
    report.html

Promises
- One driver at a time: a second one on the same directory is refused (an flock that dies with its holder).
- `create` never reuses a directory; `open` refuses one that is not a run.
- What this machine cannot tell about itself (no git, code shipped without its package) is null.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from services.config import Config
from services.config_file import PROJECT_ROOT, ConfigError, dump_config, load_config

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "ray", "redis", "rapidocr", "onnxruntime")

LOOK_S = 2.0
"""How long a driver that finds the run held tries again."""


class RunDirectory:
    """Paths of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    @classmethod
    def create(cls, config: Config) -> RunDirectory:
        """Make `<run.directory>/<run.name>-<UTC time>` and record the configuration in it."""
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        root = config.run.directory / f"{config.run.name}-{stamp}-{secrets.token_hex(2)}"
        try:
            root.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"run.directory {config.run.directory}: cannot make {root}: {error}") from error
        run = cls(root)
        for folder in (run.samples, run.checkpoints, run.logs, run.queue):
            folder.mkdir()
        run.secrets.mkdir(mode=0o700)
        run.config_file.write_text(dump_config(config))
        (run.root / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
        return run

    @classmethod
    def open(cls, root: Path) -> RunDirectory:
        """An existing run.

        Raises:
            ConfigError: the directory is missing, or holds no config.yaml.
        """
        run = cls(root)
        if not run.config_file.is_file():
            raise ConfigError(f"{root}: not a run directory (no config.yaml in it)")
        return run

    @property
    def name(self) -> str:
        """Names the run in Redis keys and Ray actors; unique to the directory."""
        return self.root.name

    @property
    def config_file(self) -> Path:
        return self.root / "config.yaml"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def groups(self) -> Path:
        return self.root / "groups"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def queue(self) -> Path:
        return self.root / "queue"

    @property
    def secrets(self) -> Path:
        return self.root / "secrets"

    def config(self, overrides: tuple[str, ...] = ()) -> Config:
        """The configuration of the run: that of its start, or of its last resume (services/resuming.py)."""
        return load_config(self.config_file, overrides)

    def secret(self, name: str) -> Path:
        """A file with a random token, made at the first call, readable by the owner alone."""
        path = self.secrets / name
        self.secrets.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_urlsafe(32))
        return path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for one driver.

        Raises:
            ConfigError: another driver holds it; its pid is named.
        """
        path = self.root / "driver.lock"
        with path.open("a+") as file:
            give_up = time.monotonic() + LOOK_S
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    # Whoever looks for a driver holds it too, for a moment.
                    if time.monotonic() < give_up:
                        time.sleep(0.05)
                        continue
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    raise ConfigError(
                        f"{self.root}: another driver (pid {holder}) is running this run"
                    ) from None
            file.seek(0)
            file.truncate()
            file.write(f"{os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def driver(self) -> int | None:
        """Process id of the driver that holds the run; None where none does on this machine."""
        try:
            with (self.root / "driver.lock").open("r") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(file.read().split()[0])
        except (OSError, ValueError, IndexError):
            pass
        return None

    def driver_elsewhere(self) -> str | None:
        """Name of the machine that the last driver ran on, where that is not this one."""
        try:
            _, _, host = (self.root / "driver.lock").read_text().partition(" on ")
        except OSError:
            return None
        return host if host and host != socket.gethostname() else None


def environment() -> dict[str, object]:
    """Versions, git revision and machine, for whoever wants to reproduce the run."""
    return {
        "dgpo-cluster": _version("dgpo-cluster"),
        "git": _git_revision(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    command = ["git", "-C", str(PROJECT_ROOT), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
