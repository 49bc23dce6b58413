"""How a vision-language judge's answer becomes a score. Pure functions.

Promises
- A score is read from an answer or NoScore says why there is none: an answer that cannot be understood, is
  cut off, contradicts itself, or uses another scale is never a number.

The answer's form is OpenAI's chat completion, as vLLM and SGLang give it.
"""

from __future__ import annotations

import math
import re
from typing import Final

from pydantic import BaseModel, Field, ValidationError

_NUMBER_GOES_ON: Final = re.compile(r"\d|[.,]\d")
_OUT_OF: Final = re.compile(r"\s*(?:/|out of)\s*(\d+(?:\.\d+)?)")
_CUT: Final = "[cut off at max_tokens]"
_SHOWN_CHARS: Final = 200


class NoScore(Exception):
    """Why an answer holds no score."""


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class Completion(BaseModel):
    """The parts of a chat completion that are read."""

    choices: list[_Choice] = Field(min_length=1)


def read_answer(body: bytes) -> str:
    """The judge's text in a chat completion; without its last word, and saying so, where it was cut off.

    Raises:
        NoScore: it is none, or the judge refused or was stopped.
    """
    try:
        choice = Completion.model_validate_json(body).choices[0]
    except ValidationError as error:
        shown = body[:_SHOWN_CHARS].decode("utf-8", "replace")
        raise NoScore(f"no chat completion: {error.errors()[0]['msg']}; got {shown!r}") from error
    if choice.message.refusal:
        raise NoScore(f"the judge refused: {choice.message.refusal!r:.200}")
    if choice.finish_reason == "content_filter":
        raise NoScore("the judge's answer was held back by a content filter")
    text = choice.message.content or ""
    if not text.strip():
        raise NoScore(f"the judge said nothing (finish_reason {choice.finish_reason!r})")
    if choice.finish_reason == "length":
        # A number at the very end may have lost digits; what comes before the last word is whole.
        return re.sub(r"\S*$", "", text) + _CUT
    return text


def read_score(text: str, pattern: re.Pattern[str], score_range: tuple[float, float] | None) -> float:
    """The number in a judge's text, as the judge wrote it.

    >>> read_score("A cat. Final Score: 4.5", re.compile(r"Final Score:\\s*([1-5](?:\\.\\d+)?)"), (1.0, 5.0))
    4.5

    Args:
        pattern: one group, the number.
        score_range: least and greatest number that the scale has; None takes any.

    Raises:
        NoScore: no match; several that differ; a match that is only the beginning of a number (`1` of `10`);
            another scale (`4/10`); a number outside the range or not finite.
    """
    found = {_number(text, match, score_range) for match in pattern.finditer(text)}
    if not found:
        raise NoScore(f"{pattern.pattern!r} is not in the answer: {_end(text)}")
    if len(found) > 1:
        raise NoScore(f"the answer holds several scores, {sorted(found)}: {_end(text)}")
    return found.pop()


def _number(text: str, match: re.Match[str], score_range: tuple[float, float] | None) -> float:
    written, place = match.group(1), _end(text)
    try:
        number = float(written)
    except (TypeError, ValueError) as error:
        raise NoScore(f"{written!r} is no number: {place}") from error
    if not math.isfinite(number):
        raise NoScore(f"{written!r} is not finite: {place}")
    end = match.end(1)
    if written[-1:].isdigit() and _NUMBER_GOES_ON.match(text, end):
        raise NoScore(f"{written!r} is only the beginning of a number: {place}")
    if score_range is None:
        return number
    low, high = score_range
    if not low <= number <= high:
        raise NoScore(f"{written} is outside {low:g} to {high:g}: {place}")
    if (scale := _OUT_OF.match(text, end)) and float(scale.group(1)) != high:
        raise NoScore(f"{written} out of {scale.group(1)}, expected out of {high:g}: {place}")
    return number


def _end(text: str) -> str:
    """The end of an answer, where scores stand, for an error text."""
    return repr(text if len(text) <= _SHOWN_CHARS else "..." + text[-_SHOWN_CHARS:])
