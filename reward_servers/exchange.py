"""One HTTP exchange with a server that is not trusted: a reward server, or the endpoint of a judge.

Promises
- A token goes to its address only: redirects are not followed, and no proxy of the environment is asked for
  this machine's own addresses.
- An answer is read up to `MAX_ANSWER_BYTES` and no further (`overflow`), uncompressed, within `seconds`.
- What came does not hold the token any more where the server repeats it.
- Over https certificate and host name are verified.
- What failed on the way, and may pass, is Transient; a server that does not prove who it is, or speaks no
  TLS, is Untrusted; whatever else came is an Answer.
"""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import httpx
from pydantic import ValidationError

from reward_servers.protocol import JSON_TYPE, ErrorBody, shortened
from reward_servers.tls import client_context, refusal

MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
AUTHORITY: Final = "rewards[].tls_ca or --tls-ca"
"""Where the authority of a server's certificate is named."""
_SHOWN_CHARS: Final = 300
_SECRET_CHARS: Final = 8
"""What is shorter may stand in any answer, and is no secret."""


class Transient(Exception):
    """A failed attempt that is worth another one."""

    def __init__(self, what: str, retry_after_s: float = 0.0) -> None:
        super().__init__(what)
        self.retry_after_s = retry_after_s


class Untrusted(Exception):
    """No connection was made, and no other attempt will make one: TLS does not let it."""


class Answer:
    """A response as far as it was read."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        self.body = bytearray()
        self.overflow = False
        """It is longer than was read."""
        self._retry_after = response.headers.get("retry-after", "")
        self._location = response.headers.get("location", "")

    def takes(self, chunk: bytes) -> bool:
        """Add what was read; False where that is too much, and reading on is of no use."""
        self.overflow = len(self.body) + len(chunk) > MAX_ANSWER_BYTES
        if not self.overflow:
            self.body += chunk
        return not self.overflow

    def hide(self, secret: str | None) -> None:
        """Take a token out of what came: some servers repeat the headers of a request."""
        if secret is not None and len(secret) >= _SECRET_CHARS:
            self.body = self.body.replace(secret.encode(), b"***")
            self._location = self._location.replace(secret, "***")

    @property
    def may_pass(self) -> bool:
        """Whether the same request may be answered otherwise later."""
        return not self.overflow and (self.status in (408, 429) or self.status >= 500)

    @property
    def retry_after_s(self) -> float:
        """Seconds that the server asks to wait; 0 where it does not say."""
        try:
            return max(0.0, float(self._retry_after))
        except ValueError:
            pass
        try:
            when = email.utils.parsedate_to_datetime(self._retry_after)
            return max(0.0, when.timestamp() - time.time())
        except (ValueError, OverflowError):
            return 0.0

    @property
    def shown(self) -> str:
        """What came, for an error text."""
        if self.overflow:
            return f"{self.status}, more than {MAX_ANSWER_BYTES} bytes"
        try:
            body = ErrorBody.model_validate_json(bytes(self.body))
            return shortened(f"{self.status} {body.error}: {body.detail}")
        except ValidationError:
            pass
        text = bytes(self.body[:_SHOWN_CHARS]).decode("utf-8", "replace")
        where = f" to {shortened(self._location, _SHOWN_CHARS)}" if self._location else ""
        return f"{self.status}{where} {self.kind or 'without a content type'}: {text!r}"


def client_options(
    url: httpx.URL,
    token: str | None,
    headers: dict[str, str] | None = None,
    *,
    authority: str | None = None,
) -> dict[str, Any]:
    """What a client of httpx is made with.

    Args:
        url: http:// or https://, of the server.
        token: bearer token; None sends none.
        authority: certificates to trust beside the system's, PEM; for https:// only.
    """
    return {
        "headers": {
            "Accept": JSON_TYPE,
            # The size of the answer is bounded before it is unpacked.
            "Accept-Encoding": "identity",
            **({"Authorization": f"Bearer {token}"} if token else {}),
            **(headers or {}),
        },
        # A proxy of the environment cannot reach this machine's loopback.
        "trust_env": not is_loopback(url.host),
        "follow_redirects": False,
        # Reading the certificates takes longer than many a request, and http has no use for them.
        "verify": client_context(authority) if url.scheme == "https" else False,
    }


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("rewards.example")
    (True, True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def ask(
    client: httpx.Client, method: str, url: str, seconds: float, token: str | None, **content: Any
) -> Answer:
    """The answer to one request.

    Args:
        seconds: for the whole exchange; headers that drip are bounded by each read only.
        token: taken out of what came.
        content: as httpx takes it, `content` or `json`.

    Raises:
        Transient: none came in time.
        Untrusted: none can come.
    """
    until = time.monotonic() + seconds
    with _told(seconds), client.stream(method, url, timeout=seconds, **content) as response:
        answer = Answer(response)
        for chunk in response.iter_raw():
            # httpx bounds each read, not their sum: a server may drip.
            if time.monotonic() > until:
                raise Transient(f"no whole answer within {seconds:.3g} s")
            if not answer.takes(chunk):
                break
        answer.hide(token)
        return answer


async def ask_async(
    client: httpx.AsyncClient, method: str, url: str, seconds: float, token: str | None, **content: Any
) -> Answer:
    """`ask`, on an event loop; whatever drips ends in time."""
    with _told(seconds):
        async with (
            asyncio.timeout(seconds),
            client.stream(method, url, timeout=seconds, **content) as response,
        ):
            answer = Answer(response)
            async for chunk in response.aiter_raw():
                if not answer.takes(chunk):
                    break
            answer.hide(token)
            return answer


@contextmanager
def _told(seconds: float) -> Iterator[None]:
    try:
        yield
    except (TimeoutError, httpx.TimeoutException) as error:
        raise Transient(f"no answer within {seconds:.3g} s ({type(error).__name__})") from error
    except httpx.TransportError as error:
        if why := refusal(error, AUTHORITY):
            raise Untrusted(why) from error
        raise Transient(f"{type(error).__name__}: {error}") from error
