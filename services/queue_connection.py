"""One way to reach the queue server: deadlines on every command, reconnects with backoff, errors with a name.

Promises
- A wrong address, a refused login or a server that does not answer raises `QueueUnreachable`, which names
  host, port and what failed, and never the password.
- `redis://`, `rediss://` (TLS) and `unix://` addresses and ACL users (`redis://worker@host/0`) work alike.
- Over TLS certificate and host name are verified; an address that would turn that off is refused.
- What no retry mends is not retried: a certificate that proves nothing, a server that does not speak TLS or
  speaks nothing else.
- A command that meets a lost connection is sent again, for about 20 s: the scripts of the queue bear being
  run twice. A server that takes commands and does not answer is given `SOCKET_TIMEOUT_S` each time.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.retry import Retry

from reward_servers.tls import client_context, refusal
from services.config.parts import unverified
from services.spoken import OWN_PORT, spoken

SOCKET_TIMEOUT_S = 10.0
"""No command may block longer; blocking reads stay well below it."""
SCHEMES = ("redis", "rediss", "unix")
WRITE_BYTES = 256 * 1024
"""Sent in one write, where a command has many parts."""
AUTHORITY = "queue.tls_ca"
"""Where the authority of the server's certificate is named."""
NOT_REDIS = "not Redis, answers there"
"""Of a server that is none for a queue."""
_LOOK_S = 2.0
"""How long a server that was not understood may take to show what it speaks."""


class QueueUnreachable(ConnectionError):
    """The queue server cannot be used; says where, what failed and what to check."""


def place(url: str) -> str:
    """host:port of an address, without user and password."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as error:
        raise QueueUnreachable(f"queue address: the port is not a number from 0 to 65535 ({error})") from None
    if parts.scheme == "unix":
        return parts.path
    return f"{parts.hostname or 'localhost'}:{port or 6379}"


def connect(
    url: str,
    password: str | None = None,
    *,
    user: str | None = None,
    authority: str | None = None,
    deadline_s: float = 5.0,
) -> redis.Redis:
    """A client that has logged in and been answered.

    Args:
        url: `redis[s]://[user@]host[:port][/db]`.
        password: of that user, or of the server; wins over one in the URL.
        user: ACL user, where the URL names none.
        authority: certificates to trust beside the system's, PEM; for `rediss://`.
        deadline_s: how long a server that does not answer yet is waited for. A refused login fails at once.

    Raises:
        QueueUnreachable: there is no usable server at `url`.
    """
    scheme = urlsplit(url).scheme
    if scheme not in SCHEMES:
        found = f"{scheme}://" if scheme else "none"
        raise QueueUnreachable(f"queue address must begin with redis:// or rediss://, its scheme is {found}")
    where = place(url)
    if refused := unverified(url):
        raise QueueUnreachable(f"queue address for {where}: {refused}")
    if authority is not None and scheme != "rediss":
        raise QueueUnreachable(f"queue address for {where}: {AUTHORITY} is for rediss://, not {scheme}://")
    login = {"username": user, "password": password, "ssl_ca_data": authority}
    options = {name: value for name, value in login.items() if value is not None}
    try:
        probe = _client(url, options, Retry(NoBackoff(), 0), timeout_s=min(deadline_s, SOCKET_TIMEOUT_S))
    except (ValueError, TypeError, redis.RedisError) as error:
        raise QueueUnreachable(f"queue address for {where}: {error}") from None
    give_up = time.monotonic() + deadline_s
    try:
        _ping(probe, url, give_up)
    finally:
        probe.close()
    # 0.05, 0.1, ... capped at 2 s: together about 20 s.
    retry = _Mendable(ExponentialWithJitterBackoff(base=0.05, cap=2.0), 16)
    return _client(url, options, retry, timeout_s=SOCKET_TIMEOUT_S)


class _Mendable(Retry):
    """Tries again what another attempt may mend."""

    def call_with_retry(
        self,
        do: Callable[[], Any],
        fail: Any,
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> Any:
        def mendable(error: Exception) -> bool:
            return refusal(error, AUTHORITY) is None and (is_retryable is None or is_retryable(error))

        return super().call_with_retry(do, fail, mendable, with_failure_count)


class _WholeSends:
    """Mixed into a connection: a command goes out in few large writes.

    redis-py writes every value above 6 kB by itself, and what is between two of them too: of a group of
    10 kB that was a tenth of its whole way through the queue. What is large is still not copied.
    """

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        sender: Any = super()
        sender.send_packed_command(
            command if isinstance(command, str) else whole_writes(command), check_health
        )


def whole_writes(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same bytes in pieces of about `WRITE_BYTES`, larger ones as they are."""
    small: list[bytes | memoryview] = []
    size = 0
    for piece in pieces:
        if small and size + len(piece) > WRITE_BYTES:
            yield b"".join(small)
            small, size = [], 0
        if len(piece) > WRITE_BYTES:
            yield piece
        else:
            small.append(piece)
            size += len(piece)
    if small:
        yield b"".join(small)


class _Tcp(_WholeSends, redis.Connection): ...


class _Tls(_WholeSends, redis.SSLConnection): ...


class _Unix(_WholeSends, redis.UnixDomainSocketConnection): ...


_CONNECTIONS = {"redis": _Tcp, "rediss": _Tls, "unix": _Unix}


def _client(url: str, options: dict[str, Any], retry: Retry, *, timeout_s: float) -> redis.Redis:
    keepalive = {"socket_keepalive": True} if urlsplit(url).scheme != "unix" else {}
    client: redis.Redis = redis.Redis.from_url(
        url,
        **options,
        **keepalive,
        connection_class=_CONNECTIONS[urlsplit(url).scheme],
        protocol=2,
        decode_responses=False,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        health_check_interval=0,
        retry=retry,
    )
    return client


def _ping(client: redis.Redis, url: str, give_up: float) -> None:
    where, look_s = place(url), min(_LOOK_S, give_up - time.monotonic())
    while True:
        try:
            client.ping()
            return
        except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            raise QueueUnreachable(
                f"queue server at {where} refused the login: {_first_line(error)}; "
                "check user and password (queue.password_env, queue.logins)"
            ) from None
        except TypeError as error:
            # redis-py hands the options of an address on as they are, and only when it connects.
            raise QueueUnreachable(f"queue address for {where}: {error}") from None
        except redis.BusyLoadingError:
            failed = "it is still loading its data"
        except (redis.ConnectionError, redis.TimeoutError) as error:
            failed = _first_line(error)
            if refused := refusal(error, AUTHORITY) or _speaks_otherwise(url, look_s):
                raise QueueUnreachable(f"queue server at {where} is not used: {refused}") from None
        except redis.InvalidResponse as error:
            what = _speaks_otherwise(url, look_s) or _first_line(error)
            raise QueueUnreachable(f"no queue server answers at {where}: {what}") from None
        except redis.ResponseError as error:
            if "NOAUTH" in str(error) or "WRONGPASS" in str(error):
                raise QueueUnreachable(f"queue server at {where} refused the login: {error}") from None
            raise QueueUnreachable(f"no queue server answers at {where}: {_first_line(error)}") from None
        except redis.RedisError as error:
            raise QueueUnreachable(f"no queue server answers at {where}: {_first_line(error)}") from None
        if time.monotonic() >= give_up:
            raise QueueUnreachable(f"queue server at {where} cannot be reached: {failed}")
        time.sleep(0.1)


def _speaks_otherwise(url: str, look_s: float) -> str | None:
    """What is wrong with the scheme of an address whose server was not understood; None: nothing is known."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return None
    host, port = parts.hostname or "localhost", parts.port or 6379
    match spoken(host, port, look_s):
        case "grpc":
            return f"gRPC, {NOT_REDIS}: Ray's GCS has 6379 by default; {OWN_PORT}"
        case "http":
            return f"a web server, {NOT_REDIS}"
        case "redis" if parts.scheme == "rediss":
            return "it speaks no TLS: give it a certificate, or an address that begins with redis://"
        case None if parts.scheme == "redis":
            with suppress(OSError), socket.create_connection((host, port), look_s) as connection:
                if _speaks_tls(connection):
                    return "it speaks TLS: the address must begin with rediss://"
    return None


def _speaks_tls(connection: socket.socket) -> bool:
    try:
        client_context().wrap_socket(connection, server_hostname="localhost").close()
    except ssl.SSLCertVerificationError:
        return True
    except OSError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
