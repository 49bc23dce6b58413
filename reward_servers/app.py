"""The HTTP application of one reward: FastAPI, without Ray.

Promises
- Every path but /healthz asks for the bearer token, before it reads a body.
- A body over the limit is refused from its Content-Length, or as soon as it has grown too long; one that has
  not come within `deadline_s` gives its place up (408).
- Every answer that is not 2xx is an ErrorBody; 429 and 503 say when to come back.
- Nobody is answered on /healthz before the scorer is warm; it is 503 when the scorer hangs.
- A request whose client has gone gives its place up, and is not scored if it still waits.

Served by Ray Serve (deployment.py) and by plain uvicorn (local.py) alike. What it says of itself is in
openapi.py, and that is what it is tested against.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from reward_servers.engine import ScoringEngine
from reward_servers.protocol import (
    HEALTH_PATH,
    INFO_PATH,
    JSON_TYPE,
    SCORE_PATH,
    TENSOR_TYPE,
    ItemError,
    ProtocolError,
    ScoreResponse,
    ServerInfo,
)
from reward_servers.scorer import ItemScore, Scorer
from reward_servers.scorers import load_scorer
from reward_servers.server_config import ServerConfig
from reward_servers.wire import ScoreCall, decode_json, decode_tensors

log = logging.getLogger(__name__)

Result = TypeVar("Result")
_GONE: Final = "the client has gone"
"""Seen by nobody but a log."""


def create_app(config: ServerConfig, *, scorer: Scorer | None = None) -> FastAPI:
    """The application of one reward. The scorer is loaded here and warmed up when the server starts.

    Args:
        scorer: scores in place of `config.app`, for tests and for scorers of other packages.
    """
    token = config.token().encode("ascii")
    scorer = scorer or load_scorer(config.app, config.args, config.threads)
    engine = ScoringEngine(
        scorer,
        # Where merging cannot be seen in a score, it only fills the scorer's batches.
        merge=config.batching == "dynamic" or scorer.batch_invariant,
        deadline_s=config.deadline_s,
        max_pending=config.max_pending,
    )
    info = _info(config, engine.scorer)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.stop()

    app = FastAPI(
        lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None,
        # They would lead to wherever the Host header says.
        redirect_slashes=False,
    )  # fmt: skip
    app.state.engine = engine

    @app.get(HEALTH_PATH)
    async def healthz() -> dict[str, str]:
        if stalled := engine.stalled:
            raise ProtocolError(503, stalled, retry_after_s=5)
        return {"status": "ok"}

    @app.get(INFO_PATH)
    async def server_info(request: Request) -> ServerInfo:
        _check_token(request, token)
        return info

    @app.post(SCORE_PATH)
    async def score(request: Request) -> Response:
        _check_token(request, token)
        with engine.admitted():
            call = await _read(request, config)
            refused = _refused(engine.scorer, call)
            if refused is not None:
                raise ProtocolError(422, refused)
            answer = _answer(info, await _unless_gone(request, engine.score(call)))
        # Serialised here and once: FastAPI would validate it and build it anew.
        return Response(answer.model_dump_json(), media_type=JSON_TYPE)

    _add_error_bodies(app)
    return app


def _info(config: ServerConfig, scorer: Scorer) -> ServerInfo:
    return ServerInfo(
        # What it was asked for by: a scorer of another package does not know under which name.
        reward=config.app,
        model=scorer.model,
        version=scorer.full_version,
        batch_invariant=scorer.batch_invariant,
        batching=config.batching,
        max_batch=scorer.max_batch,
        limits=config.limits,
    )


def _check_token(request: Request, token: bytes) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Latin-1 takes any header; compare_digest then takes the same time wherever they differ.
    same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), token)
    if scheme.lower() != "bearer" or not same:
        raise ProtocolError(401, "send the header 'Authorization: Bearer TOKEN' with this server's token")


async def _read(request: Request, config: ServerConfig) -> ScoreCall:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (JSON_TYPE, TENSOR_TYPE):
        raise ProtocolError(415, f"content type {kind!r}; send {JSON_TYPE} or {TENSOR_TYPE}")
    try:
        async with asyncio.timeout(config.deadline_s):
            body = await _body(request, config.limits.max_body_bytes)
    except TimeoutError:
        raise ProtocolError(408, f"the body did not come within {config.deadline_s:g} s") from None
    except ClientDisconnect:
        raise ProtocolError(408, _GONE) from None
    if kind == TENSOR_TYPE:
        return decode_tensors(body, config.limits)
    # PNG decoding takes long enough to keep other requests from being accepted.
    return await asyncio.to_thread(decode_json, body, config.limits)


async def _body(request: Request, limit: int) -> bytes:
    too_large = ProtocolError(413, f"the body has more than {limit} bytes, which is the limit")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _unless_gone(request: Request, scoring: Coroutine[Any, Any, Result]) -> Result:
    """The result, given up as soon as nobody is there to have it."""
    task = asyncio.create_task(scoring)
    # The body has been read: what comes next can only be that the client has gone.
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ProtocolError(408, _GONE)
    finally:
        task.cancel()
        gone.cancel()


def _refused(scorer: Scorer, call: ScoreCall) -> str | None:
    """Why the request can never be scored, if it cannot."""
    previous: Any = None
    for index, pair in enumerate(zip(call.prompts, call.metadata, strict=True)):
        if pair == previous:
            continue
        if reason := scorer.check(*pair):
            return f"item {index}: {reason}"
        previous = pair
    return None


def _answer(info: ServerInfo, items: Sequence[ItemScore]) -> ScoreResponse:
    return ScoreResponse(
        scores=tuple(item.score for item in items),
        details=tuple(item.details for item in items),
        errors=tuple(
            ItemError(index=index, error=item.error)
            for index, item in enumerate(items)
            if item.error is not None
        ),
        reward=info.reward,
        model=info.model,
        version=info.version,
    )


def _add_error_bodies(app: FastAPI) -> None:
    @app.exception_handler(ProtocolError)
    async def on_protocol_error(request: Request, error: ProtocolError) -> Response:
        headers = {}
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(math.ceil(error.retry_after_s))
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if error.status in (401, 408, 413, 415, 429, 503):
            # The body may not have been read, and then the connection cannot carry another request.
            headers["Connection"] = "close"
        return Response(error.body.model_dump_json(), error.status, headers, JSON_TYPE)

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> Response:
        detail = f"{request.method} {request.url.path}: {error.detail}; this server has {HEALTH_PATH}, "
        refused = ProtocolError(error.status_code, detail + f"{INFO_PATH} and {SCORE_PATH}")
        return Response(refused.body.model_dump_json(), error.status_code, error.headers, JSON_TYPE)

    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> Response:
        log.exception("request failed", exc_info=error)
        failed = ProtocolError(500, f"{type(error).__name__} in the reward server; see its log")
        return Response(failed.body.model_dump_json(), 500, media_type=JSON_TYPE)
