"""One reward server in this process, by plain uvicorn: for tests, and to run a reward alone.

    python -m reward_servers.local ocr --token-file TOKEN --port 8100

Promises
- Binds loopback unless told otherwise; port 0 takes a free one.
- `LocalServer` is ready when it is entered, or raises within its deadline; its thread ends with it.
"""

from __future__ import annotations

import argparse
import json
import socket
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn

from reward_servers.app import create_app
from reward_servers.server_config import ServerConfig

LOOPBACK = "127.0.0.1"


class LocalServer(AbstractContextManager["LocalServer"]):
    """Serves an ASGI application in a thread while the context is open."""

    def __init__(self, app: Any, *, port: int = 0, deadline_s: float = 60.0) -> None:
        self._socket = socket.create_server((LOOPBACK, port))
        self.url = f"http://{LOOPBACK}:{self._socket.getsockname()[1]}"
        self._deadline_s = deadline_s
        self._settled = threading.Event()
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        self._server = _Server(config, self._settled)
        self._thread = threading.Thread(target=self._run, name=f"reward-server-{self.url}", daemon=True)

    def __enter__(self) -> LocalServer:
        self._thread.start()
        if not self._settled.wait(self._deadline_s) or not self._server.started:
            self._server.should_exit = True
            raise RuntimeError(
                f"reward server at {self.url}: not ready within {self._deadline_s:g} s; see its log"
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.should_exit = True
        self._thread.join(self._deadline_s)
        self._socket.close()

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._settled.set()


class _Server(uvicorn.Server):
    """Says when it has started, so that nobody polls."""

    def __init__(self, config: uvicorn.Config, settled: threading.Event) -> None:
        super().__init__(config)
        self._settled = settled

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._settled.set()


def main() -> None:
    """Serve one reward until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m reward_servers.local", description=main.__doc__)
    parser.add_argument("app", help="scorer of reward_servers/scorers")
    parser.add_argument("--args", type=json.loads, default={}, help="arguments of the scorer, JSON")
    parser.add_argument("--host", default=LOOPBACK)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--threads", type=int, default=1)
    token = parser.add_mutually_exclusive_group(required=True)
    token.add_argument("--token-file", type=Path, help="file with the bearer token, mode 0600")
    token.add_argument("--token-env", help="environment variable with the bearer token")
    given = parser.parse_args()
    config = ServerConfig(
        app=given.app,
        args=given.args,
        threads=given.threads,
        token_file=given.token_file,
        token_env=given.token_env,
    )
    uvicorn.run(create_app(config), host=given.host, port=given.port, access_log=False)


if __name__ == "__main__":
    main()
