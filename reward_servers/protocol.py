"""Reward protocol v1: what clients and reward servers say to each other.

    POST /v1/score   ScoreRequest (JSON), or the binary body of wire.py  ->  ScoreResponse
    GET  /v1/info    ->  ServerInfo
    GET  /healthz    ->  {"status": "ok"}; the only path that asks for no token

Promises
- A score is a finite number, or it is null and `errors` says why: a failed item is never a zero.
- Every answer of a reward server that is not 2xx has an ErrorBody, whatever went wrong; what Ray Serve
  refuses in its place too, where its proxy is started as deploy/serve/rewards.yaml says. Whatever else stands
  between (a load balancer) may answer in a form of its own: then the status and Retry-After count.
- Scoring is idempotent: a client may send a request again.

Imports neither the web framework nor a scorer: clients need only this.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, Strict, ValidationError, model_validator

PROTOCOL: Final = "v1"
SCORE_PATH: Final = "/v1/score"
INFO_PATH: Final = "/v1/info"
HEALTH_PATH: Final = "/healthz"
JSON_TYPE: Final = "application/json"
TENSOR_TYPE: Final = "application/vnd.safetensors"
"""Content type of the binary body."""

MAX_DETAIL_CHARS: Final = 2000
"""Of an error, which may repeat what was sent."""

STATUS_NAMES: Final = {
    400: "bad_request",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_too_late",
    413: "too_large",
    415: "unsupported_media_type",
    422: "unprocessable",
    429: "overloaded",
    500: "scorer_failed",
    503: "unavailable",
    504: "deadline_passed",
}
"""Status -> the `error` of its body."""

Metadata = dict[str, JsonValue]


class ProtocolModel(BaseModel):
    """Base of everything on this wire: frozen, closed to unknown fields, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Limits(ProtocolModel):
    """What a request may hold. Checked before anything is decoded."""

    max_images: int = Field(default=256, ge=1)
    """Images in a request."""
    max_side: int = Field(default=4096, ge=1)
    """Height or width of an image, pixels."""
    max_pixels: int = Field(default=2048 * 2048, ge=1)
    """Height x width of one image."""
    max_total_pixels: int = Field(default=64 * 1024 * 1024, ge=1)
    """Sum of height x width over a request."""
    max_body_bytes: int = Field(default=256 * 1024 * 1024, ge=1024)
    """Bytes of a request body."""
    max_prompt_chars: int = Field(default=8192, ge=1)
    """Characters of one prompt."""
    max_header_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    """Bytes of prompts and metadata: the header of a binary body, all but the images of a JSON body."""


class ScoreRequest(ProtocolModel):
    """The JSON body of POST /v1/score.

    >>> ScoreRequest(images=("iVBO...",), prompts='a sign that says "K7QX"').prompts
    'a sign that says "K7QX"'
    """

    images: tuple[str, ...]
    """PNG files, base64."""
    prompts: str | tuple[str, ...]
    """One for all images, or one an image."""
    metadata: Metadata | tuple[Metadata, ...] = Field(default_factory=dict)
    """What a scorer needs beside the prompt; one for all images, or one an image."""


class ItemError(ProtocolModel):
    """Why one image has no score."""

    index: int = Field(ge=0)
    """Position in the request's images."""
    error: str


class ScoreResponse(ProtocolModel):
    """The answer to POST /v1/score.

    >>> ScoreResponse(scores=(0.75,), details=({"text": "K7Q", "exact": 0},), reward="ocr",
    ...               model="demo", version="1").scores
    (0.75,)
    """

    scores: tuple[Annotated[float, Strict()] | None, ...]
    """One an image, in the order of the request; null where `errors` says why. A number in quotes, true and
    false are no scores."""
    details: tuple[dict[str, Any], ...]
    """What the scorer saw, one an image."""
    errors: tuple[ItemError, ...] = ()
    reward: str
    """The scorer that answered: the app's name."""
    model: str
    """The weights behind the scores."""
    version: str
    """Of the scorer's formula, preprocessing and arguments: scores of one model and version compare."""

    @model_validator(mode="after")
    def _whole(self) -> ScoreResponse:
        if len(self.details) != len(self.scores):
            raise ValueError(f"{len(self.details)} details for {len(self.scores)} scores")
        failed = {error.index for error in self.errors}
        missing = {index for index, score in enumerate(self.scores) if score is None}
        if failed != missing:
            raise ValueError(f"errors name items {sorted(failed)}, but scores {sorted(missing)} are null")
        return self


class ServerInfo(ProtocolModel):
    """The answer to GET /v1/info."""

    reward: str
    model: str
    version: str
    protocol: Literal["v1"] = PROTOCOL
    batch_invariant: bool
    """True where an image's score does not depend, to the bit, on what else is scored with it."""
    batching: Literal["request", "dynamic"]
    """`request`: each request is scored by itself; `dynamic`: waiting requests are merged."""
    max_batch: int
    """Images that the scorer takes at once."""
    limits: Limits


class ErrorBody(BaseModel):
    """The body of every answer that is not 2xx."""

    model_config = ConfigDict(frozen=True, extra="allow")

    error: str
    """One of STATUS_NAMES."""
    detail: str
    """What was wrong and what would be valid."""


class ProtocolError(Exception):
    """A request that is answered with `status` and an ErrorBody."""

    def __init__(self, status: int, detail: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> ErrorBody:
        return ErrorBody(error=STATUS_NAMES.get(self.status, "error"), detail=shortened(self.detail))


def shortened(text: str, most: int = MAX_DETAIL_CHARS) -> str:
    """The beginning of a text that others may have written.

    >>> shortened("abcdef", 3)
    'abc...'
    """
    return text if len(text) <= most else text[:most] + "..."


def server_address(url: str) -> str:
    """Where a server is, of an address that may go on with /v1 or the path of a request.

    >>> server_address("http://h:8100/ocr/v1/score"), server_address("http://h:8100/")
    ('http://h:8100/ocr', 'http://h:8100')
    """
    bare = url.rstrip("/")
    for path in (SCORE_PATH, INFO_PATH, HEALTH_PATH, "/v1"):
        if bare.endswith(path):
            return bare.removesuffix(path).rstrip("/")
    return bare


def explained(error: ValidationError, whole: str = "") -> str:
    """What is wrong with a message, without its content: the first five places.

    Args:
        whole: what the place is called where it is not one field but all of it.
    """
    lines = [
        ": ".join(
            filter(
                None,
                (".".join(map(str, detail["loc"])) or whole, detail["msg"].removeprefix("Value error, ")),
            )
        )
        for detail in error.errors(include_input=False, include_url=False)[:5]
    ]
    return "; ".join(lines)
