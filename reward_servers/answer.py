"""What an answer of a reward server means: scores, an error, or a reason to ask again.

Promises
- `scored` returns as many finite scores as there were images, or raises; an error is never a zero.
- What came is shown in the error, shortened. An answer without an end is invalid, whatever its status.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from reward_servers.exchange import Answer, Transient
from reward_servers.protocol import JSON_TYPE, ScoreResponse, explained, shortened

_MAX_ERROR_CHARS: Final = 4000


class RewardError(Exception):
    """A reward server gave no scores. Says which one, where, and what came."""

    def __init__(self, name: str, url: str, what: str) -> None:
        what = shortened(what, _MAX_ERROR_CHARS)
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


class RewardUntrusted(RewardError):
    """The server was not asked: it did not prove over TLS that it is the one in the address."""


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


def scored(answer: Answer, *, name: str, url: str, app: str | None, count: int, attempts: int) -> Scored:
    """The scores in an answer.

    Args:
        app: the scorer that must have answered; None takes any.
        count: images that were sent.

    Raises:
        Transient: worth asking again.
        RewardRefused, RewardInvalid: not worth it.
    """
    if answer.may_pass:
        raise Transient(answer.shown, answer.retry_after_s)
    if 400 <= answer.status < 500 and not answer.overflow:
        raise RewardRefused(name, url, answer.shown)
    if answer.status != 200 or answer.kind != JSON_TYPE or answer.overflow:
        raise RewardInvalid(name, url, f"expected 200 with {JSON_TYPE}, got {answer.shown}")
    try:
        response = ScoreResponse.model_validate_json(bytes(answer.body))
    except ValidationError as error:
        raise RewardInvalid(name, url, f"{explained(error, 'answer')}; got {answer.shown}") from error
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
