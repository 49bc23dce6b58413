"""The client of a reward server: a batch of images in, finite scores out, or an error that names the server.

Promises
- `score` returns as many finite scores as there were images, or raises RewardError; an error is never a zero.
- Connection errors, timeouts, 429 (its Retry-After is kept) and 5xx are tried again with exponential backoff
  and jitter until `deadline_s` has passed: RewardUnavailable. Other refusals are not: RewardRefused. Neither
  is an answer that breaks the protocol: RewardInvalid.
- One attempt takes at most `attempt_s` (half the deadline unless said otherwise), so that a server that hangs
  once is asked again.
- Connections are kept and used again. Answers are read up to `MAX_ANSWER_BYTES`. Redirects are not followed:
  they would carry the token elsewhere.

`score` may be called from many threads; `score_async` belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx
import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception_type,
    stop_before_delay,
    wait_exponential_jitter,
)

from reward_servers.protocol import (
    JSON_TYPE,
    SCORE_PATH,
    TENSOR_TYPE,
    ErrorBody,
    Metadata,
    ScoreResponse,
)
from reward_servers.wire import encode_tensors

MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
_SHOWN_CHARS: Final = 300
_BACKOFF: Final = wait_exponential_jitter(initial=0.1, max=5.0, jitter=0.1)


class RewardError(Exception):
    """A reward server gave no scores. Says which one, where, and what came."""

    def __init__(self, name: str, url: str, what: str) -> None:
        super().__init__(f"reward {name!r} at {url}: {what}")
        self.name = name
        self.url = url
        self.what = what

    def __reduce__(self) -> tuple[Any, ...]:
        # It travels between Ray actors; the default would rebuild it from the message alone.
        return type(self), (self.name, self.url, self.what)


class RewardUnavailable(RewardError):
    """No scores before the deadline; the last failure is its cause."""


class RewardRefused(RewardError):
    """The server refused the request: wrong token, too large, or a prompt it cannot score."""


class RewardInvalid(RewardError):
    """The server answered, but not with a finite score for every image."""


@dataclass(frozen=True)
class Scored:
    """The scores of a request, in the order of its images."""

    scores: tuple[float, ...]
    details: tuple[dict[str, Any], ...]
    model: str
    version: str
    attempts: int = 1
    """Requests it took; more than one after failures that were mended."""


class _Transient(Exception):
    """A failed attempt that is worth another one."""

    def __init__(self, what: str, retry_after_s: float = 0.0) -> None:
        super().__init__(what)
        self.retry_after_s = retry_after_s


class RewardClient:
    """Calls one reward server.

    Args:
        name: the reward's name in the run, for errors.
        url: address of the server, up to and without /v1.
        token: bearer token; None sends none.
        deadline_s: seconds for one `score`, retries included.
        app: the scorer that must answer (`ocr`); None takes any.
        attempt_s: seconds for one attempt.
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
    ) -> None:
        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"reward {name!r}: {url!r} is no http:// or https:// address")
        self.name = name
        self.url = url.rstrip("/")
        self.deadline_s = deadline_s
        self._app = app
        self._attempt_s = attempt_s or deadline_s / 2
        self._target = self.url + SCORE_PATH
        self._options: dict[str, Any] = {
            "headers": {
                "Content-Type": TENSOR_TYPE,
                "Accept": JSON_TYPE,
                # The size of the answer is bounded before it is unpacked.
                "Accept-Encoding": "identity",
                **({"Authorization": f"Bearer {token}"} if token else {}),
            },
            # A proxy of the environment cannot reach this machine's loopback.
            "trust_env": not _is_loopback(parsed.host),
            "follow_redirects": False,
            # Reading the certificates takes longer than many a request, and http has no use for them.
            "verify": parsed.scheme == "https",
        }
        self._sync = httpx.Client(**self._options)
        self._async: httpx.AsyncClient | None = None

    def score(
        self,
        images: NDArray[np.uint8],
        prompts: str | Sequence[str],
        metadata: Metadata | Sequence[Metadata] | None = None,
    ) -> Scored:
        """Score `images` (N, H, W, 3), RGB, against one prompt or N.

        Raises:
            RewardError: there is no finite score for every image.
        """
        body = encode_tensors(images, prompts, metadata)
        started, failures = time.monotonic(), list[str]()
        try:
            for attempt in Retrying(**self._policy(failures)):
                with attempt:
                    answer = self._post(self._sync, body, self._left(started))
                    return self._checked(answer, len(images), attempt.retry_state.attempt_number)
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
            async for attempt in AsyncRetrying(**self._policy(failures)):
                with attempt:
                    answer = await self._post_async(self._async, body, self._left(started))
                    return self._checked(answer, len(images), attempt.retry_state.attempt_number)
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

    def _policy(self, failures: list[str]) -> dict[str, Any]:
        def note(state: RetryCallState) -> None:
            if state.outcome is not None:
                failures.append(str(state.outcome.exception()))

        return {
            "retry": retry_if_exception_type(_Transient),
            "stop": stop_before_delay(self.deadline_s),
            "wait": _wait,
            "after": note,
        }

    def _left(self, started: float) -> float:
        left = self.deadline_s - (time.monotonic() - started)
        return max(0.001, min(left, self._attempt_s))

    def _post(self, client: httpx.Client, body: bytes, seconds: float) -> _Answer:
        until = time.monotonic() + seconds
        try:
            with client.stream("POST", self._target, content=body, timeout=seconds) as response:
                answer = _Answer(response)
                for chunk in response.iter_raw():
                    answer.add(chunk)
                    # httpx bounds each read, not their sum: a server may drip.
                    if time.monotonic() > until:
                        raise _Transient(f"no whole answer within {seconds:.3g} s")
                return answer
        except httpx.TimeoutException as error:
            raise _Transient(f"no answer within {seconds:.3g} s ({type(error).__name__})") from error
        except httpx.TransportError as error:
            raise _Transient(f"{type(error).__name__}: {error}") from error

    async def _post_async(self, client: httpx.AsyncClient, body: bytes, seconds: float) -> _Answer:
        try:
            async with (
                asyncio.timeout(seconds),
                client.stream("POST", self._target, content=body, timeout=seconds) as response,
            ):
                answer = _Answer(response)
                async for chunk in response.aiter_raw():
                    answer.add(chunk)
                return answer
        except (TimeoutError, httpx.TimeoutException) as error:
            raise _Transient(f"no answer within {seconds:.3g} s ({type(error).__name__})") from error
        except httpx.TransportError as error:
            raise _Transient(f"{type(error).__name__}: {error}") from error

    def _checked(self, answer: _Answer, count: int, attempts: int) -> Scored:
        if answer.status == 429 or answer.status >= 500 or answer.status == 408:
            raise _Transient(answer.shown, answer.retry_after_s)
        if 400 <= answer.status < 500:
            raise RewardRefused(self.name, self.url, answer.shown)
        if answer.status != 200 or answer.kind != JSON_TYPE or answer.overflow:
            raise RewardInvalid(self.name, self.url, f"expected 200 with {JSON_TYPE}, got {answer.shown}")
        try:
            response = ScoreResponse.model_validate_json(bytes(answer.body))
        except ValidationError as error:
            reason = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'answer'}: {e['msg']}"
                for e in error.errors(include_url=False, include_input=False)[:3]
            )
            raise RewardInvalid(self.name, self.url, f"{reason}; got {answer.shown}") from error
        if len(response.scores) != count:
            raise RewardInvalid(self.name, self.url, f"{len(response.scores)} scores for {count} images")
        if self._app is not None and response.reward != self._app:
            raise RewardInvalid(self.name, self.url, f"{response.reward!r} answered, expected {self._app!r}")
        scores = tuple(score for score in response.scores if score is not None)
        if len(scores) != count:
            first = response.errors[0]
            raise RewardInvalid(
                self.name,
                self.url,
                f"{count - len(scores)} of {count} images have no score; item {first.index}: {first.error}",
            )
        return Scored(scores, response.details, response.model, response.version, attempts)

    def _unavailable(self, failures: Sequence[str], started: float) -> RewardUnavailable:
        # The last attempt is often cut short by the deadline: what failed before it says more.
        reasons = list(dict.fromkeys(reversed(failures)))[:3]
        return RewardUnavailable(
            self.name,
            self.url,
            f"no scores within {self.deadline_s:g} s; gave up after {len(failures)} attempts and "
            f"{time.monotonic() - started:.1f} s; last: {'; before: '.join(reasons)}",
        )


class _Answer:
    """A response as far as it was read."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        self.body = bytearray()
        self.overflow = False
        self._retry_after = response.headers.get("retry-after", "")
        self._location = response.headers.get("location", "")

    def add(self, chunk: bytes) -> None:
        if len(self.body) + len(chunk) > MAX_ANSWER_BYTES:
            self.overflow = True
            return
        self.body += chunk

    @property
    def retry_after_s(self) -> float:
        """Seconds that the server asks to wait; 0 where it does not say."""
        try:
            return max(0.0, float(self._retry_after))
        except ValueError:
            pass
        try:
            when = email.utils.parsedate_to_datetime(self._retry_after)
        except ValueError:
            return 0.0
        return max(0.0, when.timestamp() - time.time())

    @property
    def shown(self) -> str:
        """What came, for an error text."""
        if self.overflow:
            return f"{self.status}, more than {MAX_ANSWER_BYTES} bytes"
        try:
            body = ErrorBody.model_validate_json(bytes(self.body))
            return f"{self.status} {body.error}: {body.detail}"
        except ValidationError:
            pass
        text = bytes(self.body[:_SHOWN_CHARS]).decode("utf-8", "replace")
        where = f" to {self._location}" if self._location else ""
        return f"{self.status}{where} {self.kind or 'without a content type'}: {text!r}"


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after_s if isinstance(error, _Transient) else 0.0
    # Jitter on top of what was asked for: all clients that were shed come back at different times.
    return asked + _BACKOFF(state)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
