"""One reward server in this process, by plain uvicorn: in tests, and alone (`dgpo reward serve`).

Promises
- `LocalServer` binds loopback; it is ready when it is entered, or raises within its deadline; its thread ends
  with it.
- `serve_until_stopped` binds what it is told to; a first signal lets it answer what it has admitted.
- Nobody holds a connection without a request for much longer than `HEADERS_S`, nor memory by endless headers.
"""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

LOOPBACK: Final = "127.0.0.1"
HEADERS_S: Final = 20.0
"""Seconds for the headers of a request to arrive."""
STOPPING: Final = (signal.SIGINT, signal.SIGTERM)


class LocalServer(AbstractContextManager["LocalServer"]):
    """Serves an ASGI application in a thread while the context is open."""

    def __init__(self, app: Any, *, port: int = 0, deadline_s: float = 60.0) -> None:
        self._socket = socket.create_server((LOOPBACK, port))
        self.url = f"http://{LOOPBACK}:{self._socket.getsockname()[1]}"
        self._deadline_s = deadline_s
        self._settled = threading.Event()
        config = _config(app, drain_s=1)
        self._server = _Server(config, lambda started: self._settled.set())
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


def _config(app: Any, drain_s: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        # Of uvicorn's parsers the only one that bounds headers.
        http=_Protocol,
        # An upgrade is then a request like any other, and refused by the application.
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(drain_s),
    )


class _Protocol(H11Protocol):
    """Closes a connection that has had no request for two looks, `HEADERS_S` apart.

    uvicorn itself waits for ever for headers that have begun, or for a connection's first request.
    """

    _seen: RequestResponseCycle | _Protocol | None = None
    """The last request, answered; or self while one is being answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(HEADERS_S, self._look)

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is self._seen:
            self.transport.close()
            return
        self._seen = self.cycle if idle else self
        self.loop.call_later(HEADERS_S, self._look)


class _Server(uvicorn.Server):
    """Says when it has started, so that nobody polls."""

    def __init__(
        self,
        config: uvicorn.Config,
        on_settled: Callable[[bool], None],
        on_stopping: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self._on_settled = on_settled
        self._on_stopping = on_stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_settled(self.started)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stopping()
        await super().shutdown(sockets=sockets)


def serve_until_stopped(
    app: Any,
    *,
    host: str,
    port: int,
    drain_s: float,
    on_ready: Callable[[str], None],
    on_stopping: Callable[[], None] = lambda: None,
) -> None:
    """Serve in this thread until SIGINT or SIGTERM; then answer what was admitted, and return.

    Args:
        port: 0 takes a free one.
        drain_s: seconds to answer what was admitted.
        on_ready: told the address once the server takes requests.
        on_stopping: told before what was admitted is waited for, to end what would never end by itself.

    Raises:
        RuntimeError: the application did not start.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    config = _config(app, drain_s)
    ready = False
    with socket.create_server((host, port), family=family) as listening:
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        url = f"http://{shown}:{listening.getsockname()[1]}"

        def settled(started: bool) -> None:
            nonlocal ready
            ready = started
            if started:
                on_ready(url)

        server = _Server(config, settled, on_stopping)
        # uvicorn raises the signal anew when it has drained: to be stopped is no failure of a server.
        before = {number: signal.signal(number, lambda *_: None) for number in STOPPING}
        try:
            # uvicorn exits where the application does not start.
            with suppress(SystemExit):
                server.run(sockets=[listening])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if not ready:
        raise RuntimeError(f"the server at {url} did not start; see its log")
