"""An answer of a reward server, and what it means: scores, an error, or a reason to ask again.

Promises
- `scored` returns as many finite scores as there were images, or raises; an error is never a zero.
- What came is shown in the error, shortened; an answer is kept up to `MAX_ANSWER_BYTES`.
"""

from __future__ import annotations

import email.utils
import time
from dataclasses import dataclass
from typing import Any, Final

import httpx
from pydantic import ValidationError

from reward_servers.protocol import JSON_TYPE, ErrorBody, ScoreResponse

MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
_SHOWN_CHARS: Final = 300


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


class Transient(Exception):
    """A failed attempt that is worth another one."""

    def __init__(self, what: str, retry_after_s: float = 0.0) -> None:
        super().__init__(what)
        self.retry_after_s = retry_after_s


class Answer:
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


def scored(answer: Answer, *, name: str, url: str, app: str | None, count: int, attempts: int) -> Scored:
    """The scores in an answer.

    Args:
        app: the scorer that must have answered; None takes any.
        count: images that were sent.

    Raises:
        Transient: worth asking again.
        RewardRefused, RewardInvalid: not worth it.
    """
    if answer.status == 429 or answer.status >= 500 or answer.status == 408:
        raise Transient(answer.shown, answer.retry_after_s)
    if 400 <= answer.status < 500:
        raise RewardRefused(name, url, answer.shown)
    if answer.status != 200 or answer.kind != JSON_TYPE or answer.overflow:
        raise RewardInvalid(name, url, f"expected 200 with {JSON_TYPE}, got {answer.shown}")
    try:
        response = ScoreResponse.model_validate_json(bytes(answer.body))
    except ValidationError as error:
        reason = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'answer'}: {e['msg']}"
            for e in error.errors(include_url=False, include_input=False)[:3]
        )
        raise RewardInvalid(name, url, f"{reason}; got {answer.shown}") from error
    if len(response.scores) != count:
        raise RewardInvalid(name, url, f"{len(response.scores)} scores for {count} images")
    if app is not None and response.reward != app:
        raise RewardInvalid(name, url, f"{response.reward!r} answered, expected {app!r}")
    finite = tuple(score for score in response.scores if score is not None)
    if len(finite) != count:
        first = response.errors[0]
        raise RewardInvalid(
            name,
            url,
            f"{count - len(finite)} of {count} images have no score; item {first.index}: {first.error}",
        )
    return Scored(finite, response.details, response.model, response.version, attempts)
