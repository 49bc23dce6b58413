"""The OpenAI-compatible endpoint behind a vision-language judge: requests, attempts, refusals.

Promises
- Transport errors, 408, 429 and 5xx are tried again with backoff and jitter, not before Retry-After; when the
  attempts are used up, or the endpoint asks for a longer wait than `patience_s`: Unavailable. Everything else
  that is not 200 is Refused at once, and so is an endpoint that does not prove over TLS who it is.
- At most `concurrency` requests are at the endpoint at once; one that waits for its next attempt is not.
- The key goes to `base_url` only: redirects are not followed, and no error holds it.
"""

from __future__ import annotations

import asyncio
from asyncio import sleep
from types import TracebackType
from typing import Any, Final

import httpx
from pydantic import BaseModel, ValidationError
from tenacity import (
    AsyncRetrying,
    RetryError,
    retry_if_exception_type,
    stop_after_attempt,
)

from reward_servers.exchange import Answer, Transient, Untrusted, ask_async, client_options
from reward_servers.retrying import asked_and_backoff

_PAUSE: Final = asked_and_backoff(0.5, 8.0)


class Unavailable(Exception):
    """Every attempt failed in a way that may pass."""


class Refused(Exception):
    """The endpoint does not take the request, or its answer is none."""


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


class ChatEndpoint:
    """One endpoint, used inside `async with` and on that event loop only.

    Args:
        base_url: up to and with /v1.
        key: bearer token; None sends none.
        attempt_s: seconds for one attempt.
        retries: attempts after the first.
        concurrency: requests at the endpoint at once.
        patience_s: the longest Retry-After that is waited for.
    """

    def __init__(
        self,
        base_url: str,
        key: str | None,
        *,
        attempt_s: float,
        retries: int,
        concurrency: int,
        patience_s: float,
    ) -> None:
        self.url = base_url.rstrip("/")
        self._key = key
        self._attempt_s = attempt_s
        self._retries = retries
        self._patience_s = patience_s
        self._places = asyncio.Semaphore(concurrency)
        self._client = httpx.AsyncClient(
            **client_options(httpx.URL(self.url), key),
            # `_places` is the bound: waiting for a connection would count as part of an attempt.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrency),
        )

    async def __aenter__(self) -> ChatEndpoint:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._client.__aexit__(kind, error, traceback)

    async def models(self) -> list[str]:
        """Names of the models it serves.

        Raises:
            Unavailable, Refused: it does not say.
        """
        answer = await self._ask("GET", "/models", None)
        try:
            return sorted(model.id for model in _Models.model_validate_json(bytes(answer.body)).data)
        except ValidationError as error:
            raise Refused(f"expected a list of models, got {answer.shown}") from error

    async def chat(self, body: dict[str, Any]) -> bytes:
        """The body of its answer to a chat request.

        Raises:
            Unavailable, Refused: there is none.
        """
        return bytes((await self._ask("POST", "/chat/completions", body)).body)

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Answer:
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(Transient),
                stop=stop_after_attempt(self._retries + 1),
                wait=_PAUSE,
                sleep=sleep,
            ):
                with attempt:
                    async with self._places:
                        return await self._attempt(method, path, body)
        except Untrusted as error:
            raise Refused(str(error)) from error
        except RetryError as error:
            count = error.last_attempt.attempt_number
            last = error.last_attempt.exception()
            raise Unavailable(f"gave up after {count} attempts; last: {last}") from last
        raise AssertionError("unreachable: retrying ends with a return or an error")

    async def _attempt(self, method: str, path: str, body: dict[str, Any] | None) -> Answer:
        content = {} if body is None else {"json": body}
        url = self.url + path
        answer = await ask_async(self._client, method, url, self._attempt_s, self._key, **content)
        if answer.may_pass:
            if answer.retry_after_s > self._patience_s:
                raise Unavailable(f"asks to wait {answer.retry_after_s:.0f} s: {answer.shown}")
            raise Transient(answer.shown, answer.retry_after_s)
        if answer.status != 200 or answer.overflow:
            raise Refused(f"expected 200, got {answer.shown}")
        return answer
