"""The client of a reward server: a batch of images in, finite scores out, or an error that names the server.

Promises
- `score` returns as many finite scores as there were images, or raises RewardError; an error is never a zero.
- Connection errors, timeouts, 429 (its Retry-After is kept) and 5xx are tried again with exponential backoff
  and jitter, the last pauses cut short, until `deadline_s` has passed: RewardUnavailable. So is 404, of a
  server that has scored before: a proxy that comes up again knows no path at first. Other refusals are not:
  RewardRefused. Neither is an answer that breaks the protocol: RewardInvalid. Nor is a certificate that
  proves nothing, or an https server that speaks no TLS: RewardUntrusted, before anything was sent.
- One attempt takes at most `attempt_s` (half the deadline unless said otherwise), so that a server that hangs
  once is asked again, and at least 0.1 s. (Of `score`, headers that drip are bounded by each read only.)
- Connections are kept and used again. Redirects are not followed: they would carry the token elsewhere.

`score` may be called from many threads; `score_async` belongs to one event loop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import httpx
import numpy as np
from numpy.typing import NDArray
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception_type,
    stop_before_delay,
)

from reward_servers.answer import (
    RewardError,
    RewardInvalid,
    RewardRefused,
    RewardUnavailable,
    RewardUntrusted,
    Scored,
    scored,
)
from reward_servers.exchange import Answer, Transient, Untrusted, ask, ask_async, client_options
from reward_servers.protocol import (
    HEALTH_PATH,
    INFO_PATH,
    SCORE_PATH,
    TENSOR_TYPE,
    Metadata,
    ServerInfo,
    server_address,
)
from reward_servers.retrying import asked_and_backoff
from reward_servers.wire import encode_tensors

__all__ = [
    "RewardClient",
    "RewardError",
    "RewardInvalid",
    "RewardRefused",
    "RewardUnavailable",
    "RewardUntrusted",
    "Scored",
]

_BACKOFF_S: Final = (0.2, 5.0)
"""After the first attempt, and at most."""
_SHORTEST_ATTEMPT_S: Final = 0.1
"""An attempt with less could only fail, and its failure would say nothing of the server."""


class RewardClient:
    """Calls one reward server.

    Args:
        name: the reward's name in the run, for errors.
        url: address of the server; from /v1 on it is left out.
        token: bearer token; None sends none.
        deadline_s: seconds for one `score`, retries included.
        app: the scorer that must answer (`ocr`); None takes any.
        attempt_s: seconds for one attempt.
        authority: certificates to trust beside the system's, PEM; for https only.
    """

    def __init__(
        self,
        name: str,
        url: str,
        token: str | None,
        deadline_s: float = 60.0,
        *,
        app: str | None = None,
        attempt_s: float | None = None,
        authority: str | None = None,
    ) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError(f"reward {name!r}: no http:// or https:// address: {error}") from error
        if parsed.userinfo:
            raise ValueError(f"reward {name!r}: its address holds a password; give the token by itself")
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
            raise ValueError(f"reward {name!r}: {url!r} is no http:// or https:// address up to /v1")
        if authority is not None and parsed.scheme != "https":
            raise ValueError(f"reward {name!r}: an authority of TLS is for an https:// address, not {url!r}")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise ValueError(f"reward {name!r}: its token holds more than printable ASCII")
        self.name = name
        self.url = server_address(url)
        self.deadline_s = deadline_s
        self._app = app
        self._attempt_s = attempt_s or deadline_s / 2
        self._token = token
        self._target = self.url + SCORE_PATH
        self._options = client_options(parsed, token, {"Content-Type": TENSOR_TYPE}, authority=authority)
        self._sync = httpx.Client(**self._options)
        self._async: httpx.AsyncClient | None = None
        self._has_scored = False

    def score(
        self,
        images: NDArray[np.uint8],
        prompts: str | Sequence[str],
        metadata: Metadata | Sequence[Metadata] | None = None,
        *,
        spent_s: float = 0.0,
    ) -> Scored:
        """Score `images` (N, H, W, 3), RGB, against one prompt or N.

        Args:
            spent_s: of `deadline_s`, before this call.

        Raises:
            RewardError: there is no finite score for every image.
        """
        body = encode_tensors(images, prompts, metadata)
        started, failures = time.monotonic() - spent_s, list[str]()
        try:
            for attempt in Retrying(**self._policy(failures, self.deadline_s - spent_s)):
                with attempt:
                    seconds = self._left(started)
                    answer = ask(self._sync, "POST", self._target, seconds, self._token, content=body)
                    return self._scored(answer, len(images), attempt.retry_state.attempt_number)
        except Untrusted as error:
            raise RewardUntrusted(self.name, self.url, str(error)) from error
        except RetryError as error:
            raise self._unavailable(failures, started) from error.last_attempt.exception()
        raise AssertionError("unreachable: retrying ends with a return or an error")

    async def score_async(
        self,
        images: NDArray[np.uint8],
        prompts: str | Sequence[str],
        metadata: Metadata | Sequence[Metadata] | None = None,
    ) -> Scored:
        """`score`, on an event loop."""
        body = encode_tensors(images, prompts, metadata)
        started, failures = time.monotonic(), list[str]()
        if self._async is None:
            self._async = httpx.AsyncClient(**self._options)
        try:
            async for attempt in AsyncRetrying(**self._policy(failures, self.deadline_s)):
                with attempt:
                    seconds, client = self._left(started), self._async
                    answer = await ask_async(client, "POST", self._target, seconds, self._token, content=body)
                    return self._scored(answer, len(images), attempt.retry_state.attempt_number)
        except Untrusted as error:
            raise RewardUntrusted(self.name, self.url, str(error)) from error
        except RetryError as error:
            raise self._unavailable(failures, started) from error.last_attempt.exception()
        raise AssertionError("unreachable: retrying ends with a return or an error")

    def close(self) -> None:
        """Close the connections of `score`, which cannot be called again."""
        self._sync.close()

    async def aclose(self) -> None:
        """Close the connections of `score_async`."""
        if self._async is not None:
            await self._async.aclose()
            self._async = None

    def info(self, seconds: float = 5.0) -> ServerInfo | None:
        """What the server says of itself; None if it does not say so in time.

        Raises:
            RewardUntrusted: it does not prove who it is.
        """
        try:
            answer = ask(self._sync, "GET", self.url + INFO_PATH, seconds, self._token)
            return ServerInfo.model_validate_json(bytes(answer.body)) if answer.status == 200 else None
        except Untrusted as error:
            raise RewardUntrusted(self.name, self.url, str(error)) from error
        except (Transient, ValueError):
            return None

    def unreachable(self, seconds: float = 3.0) -> str | None:
        """Why no connection to the server can be made; None where one can, whatever it says then.

        Raises:
            RewardUntrusted: none ever can; it does not prove who it is.
        """
        try:
            ask(self._sync, "GET", self.url + HEALTH_PATH, seconds, self._token)
        except Untrusted as error:
            raise RewardUntrusted(self.name, self.url, str(error)) from error
        except Transient as error:
            no_connection = isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout)
            return str(error) if no_connection else None
        return None

    def _policy(self, failures: list[str], seconds: float) -> dict[str, Any]:
        def note(state: RetryCallState) -> None:
            if state.outcome is not None:
                failures.append(str(state.outcome.exception()))

        # Pauses leave time for an attempt; a server that asks for a longer one is not asked again.
        last_s = seconds - _SHORTEST_ATTEMPT_S
        return {
            "retry": retry_if_exception_type(Transient),
            "stop": stop_before_delay(last_s),
            "wait": asked_and_backoff(*_BACKOFF_S, within_s=last_s),
            "after": note,
        }

    def _left(self, started: float) -> float:
        left = self.deadline_s - (time.monotonic() - started)
        return min(max(left, _SHORTEST_ATTEMPT_S), self._attempt_s)

    def _scored(self, answer: Answer, count: int, attempts: int) -> Scored:
        if answer.status == 404 and self._has_scored:
            raise Transient(f"{answer.shown} (it has scored before: is it being started again?)")
        found = scored(answer, name=self.name, url=self.url, app=self._app, count=count, attempts=attempts)
        self._has_scored = True
        return found

    def _unavailable(self, failures: Sequence[str], started: float) -> RewardUnavailable:
        # The last attempt is often cut short by the deadline: what failed before it says more.
        reasons = list(dict.fromkeys(reversed(failures)))[:3]
        return RewardUnavailable(
            self.name,
            self.url,
            f"no scores within {self.deadline_s:g} s; gave up after {len(failures)} attempts and "
            f"{time.monotonic() - started:.1f} s; last: {'; before: '.join(reasons)}",
        )
