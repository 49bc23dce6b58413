"""What stands before a server that has no TLS of its own, and certificates made for a test."""

from __future__ import annotations

import asyncio
import ssl
import threading
from concurrent.futures import Future
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType

import trustme

from reward_servers.tls import ServerCertificate

DEADLINE_S = 20.0


def written(authority: trustme.CA, folder: Path) -> Path:
    """The PEM file that a user names."""
    path = folder / "authority.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


def certificate(
    authority: trustme.CA, folder: Path, *names: str, until: datetime | None = None
) -> ServerCertificate:
    """For a server of these names."""
    made = authority.issue_cert(*names, not_after=until)
    chain, key = folder / "chain.pem", folder / "key.pem"
    key.write_bytes(made.private_key_pem.bytes())
    chain.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
    return ServerCertificate(chain, key)


class TlsProxy:
    """Takes TLS on loopback and hands on what is in it.

    Args:
        port: of the server behind it.
        shown: what it proves itself with.
        clients: demands a certificate of clients, by this authority.
    """

    def __init__(self, port: int, shown: ServerCertificate, clients: trustme.CA | None = None) -> None:
        self.port = 0
        self.handshakes = 0
        """Begun, whatever became of them."""
        self._behind = port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.sni_callback = self._count
        if clients is not None:
            clients.configure_trust(self._context)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self.show(shown)
        self._writers = set[asyncio.StreamWriter]()
        self._loop = asyncio.new_event_loop()
        self._started: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, name="tls-proxy", daemon=True)

    def show(self, shown: ServerCertificate) -> None:
        """Prove itself with another certificate from the next connection on."""
        self._context.load_cert_chain(shown.chain, shown.key)

    def cut(self) -> None:
        """End every connection."""

        async def close() -> None:
            for writer in tuple(self._writers):
                writer.transport.abort()

        asyncio.run_coroutine_threadsafe(close(), self._loop).result(DEADLINE_S)

    def __enter__(self) -> TlsProxy:
        self._thread.start()
        self.port = self._started.result(DEADLINE_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(DEADLINE_S)

    def _count(self, *_: object) -> None:
        self.handshakes += 1

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        # A client that distrusts us ends the handshake: that is what is tested, and nothing to log.
        self._loop.set_exception_handler(lambda *_: None)
        server = await asyncio.start_server(self._hand_on, "127.0.0.1", 0, ssl=self._context)
        self._started.set_result(server.sockets[0].getsockname()[1])
        await self._end.wait()
        server.close()
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def _hand_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_reader, behind = await asyncio.open_connection("127.0.0.1", self._behind)
        self._writers |= {writer, behind}
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(_pipe(reader, behind))
                both.create_task(_pipe(behind_reader, writer))
        finally:
            self._writers -= {writer, behind}


async def _pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    # Where one side is gone there is nobody to tell: the other learns it by the end of its own connection.
    with closing(sink), suppress(OSError):
        while data := await source.read(2**16):
            sink.write(data)
            await sink.drain()
