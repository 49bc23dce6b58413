"""The OpenAPI document of reward protocol v1: docs/openapi/reward-v1.json.

Promises
- Bodies and answers are the models of protocol.py; both forms of the request, every status, the token.
- The same for every scorer: what one takes as metadata is in its own documentation.
- Deterministic; a test compares it with the committed file, another fuzzes a server by it.

`make docs` writes it (`python -m reward_servers.openapi FILE`).
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from reward_servers import protocol
from reward_servers.protocol import (
    HEALTH_PATH,
    INFO_PATH,
    JSON_TYPE,
    SCORE_PATH,
    STATUS_NAMES,
    TENSOR_TYPE,
    ErrorBody,
    ScoreRequest,
    ScoreResponse,
    ServerInfo,
)

_MEANINGS: Final = {
    400: "The request is not HTTP as it should be.",
    401: "The bearer token is absent or wrong. The body was not read.",
    408: "The body did not come in time, or Ray Serve gave the request up.",
    413: "More images, pixels, characters or bytes than the server's limits (see /v1/info).",
    415: "Neither of the two content types.",
    422: "The body cannot be read, or this scorer can never score such a prompt or metadata.",
    429: "Every place is taken, there or in front. Nothing was scored; come back after Retry-After.",
    500: "The scorer raised, or its process died.",
    503: "The scorer hangs, or the server is going down or not yet up; come back after Retry-After.",
    504: "Not scored before the deadline of the server.",
}
_BEARER: Final[dict[str, list[str]]] = {"BearerToken": []}


def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document, as JSON values."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Reward protocol",
            "version": "1",
            "summary": "Images and prompts in, one finite score an image out.",
            "description": inspect.cleandoc(protocol.__doc__ or "").partition("\n\nImports")[0],
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            SCORE_PATH: {"post": _score()},
            INFO_PATH: {"get": _info()},
            HEALTH_PATH: {"get": _health()},
        },
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"BearerToken": {"type": "http", "scheme": "bearer"}},
        },
    }


def _score() -> dict[str, Any]:
    binary = {
        "type": "string",
        "format": "binary",
        "description": "A safetensors file: one tensor `images`, U8 [N, H, W, 3], RGB, whose data fills the "
        "rest of the file; `__metadata__` holds `prompts` and, if there is any, `metadata` as JSON texts, "
        "each one value for all images or a list of one an image.",
    }
    return {
        "operationId": "score",
        "summary": "Score images. Idempotent: a request may be sent again.",
        "security": [_BEARER],
        "requestBody": {
            "required": True,
            "content": {JSON_TYPE: {"schema": _ref(ScoreRequest)}, TENSOR_TYPE: {"schema": binary}},
        },
        "responses": {
            "200": _answer("A score or an error for every image.", ScoreResponse),
            **{str(status): _error(status) for status in _MEANINGS},
            "default": _other(),
        },
    }


def _info() -> dict[str, Any]:
    return {
        "operationId": "info",
        "summary": "What the server scores, with which weights, and its limits.",
        "security": [_BEARER],
        "responses": {
            "200": _answer("What the server is.", ServerInfo),
            "401": _error(401),
            "default": _other(),
        },
    }


def _health() -> dict[str, Any]:
    return {
        "operationId": "health",
        "summary": "Whether it can score; asks for no token.",
        "security": [],
        "responses": {
            "200": {
                "description": "The scorer is warm and answers.",
                "content": {
                    JSON_TYPE: {
                        "schema": {
                            "type": "object",
                            "properties": {"status": {"const": "ok"}},
                            "required": ["status"],
                        }
                    }
                },
            },
            "503": _error(503),
            "default": _other(),
        },
    }


def _answer(description: str, model: type[BaseModel]) -> dict[str, Any]:
    return {"description": description, "content": {JSON_TYPE: {"schema": _ref(model)}}}


def _error(status: int) -> dict[str, Any]:
    answer = _answer(f"`{STATUS_NAMES[status]}`. {_MEANINGS[status]}", ErrorBody)
    if status in (429, 503):
        answer["headers"] = {
            "Retry-After": {
                "description": "Seconds to wait.",
                "required": True,
                "schema": {"type": "integer", "minimum": 1},
            }
        }
    if status == 401:
        answer["headers"] = {"WWW-Authenticate": {"required": True, "schema": {"const": "Bearer"}}}
    return answer


def _other() -> dict[str, Any]:
    """Every status that a path does not list, such as 405."""
    return _answer("Anything else that is not 2xx.", ErrorBody)


def _schemas() -> dict[str, Any]:
    """The models and what they are made of, by name."""
    _, definitions = models_json_schema(
        [
            (ScoreRequest, "validation"),
            (ScoreResponse, "serialization"),
            (ServerInfo, "serialization"),
            (ErrorBody, "serialization"),
        ],
        ref_template="#/components/schemas/{model}",
    )
    schemas: dict[str, Any] = definitions["$defs"]
    for schema in schemas.values():
        if "description" in schema:
            # Docstrings go on with examples of Python, which are of no use here.
            schema["description"] = schema["description"].partition("\n\n>>>")[0]
    images = schemas["ScoreRequest"]["properties"]["images"]
    images["minItems"] = 1
    images["items"] |= {"contentEncoding": "base64", "contentMediaType": "image/png"}
    schemas["ErrorBody"]["properties"]["error"]["enum"] = list(STATUS_NAMES.values())
    return schemas


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def text() -> str:
    """The document as the file holds it."""
    return json.dumps(document(), indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    """Write the document to the path given."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m reward_servers.openapi FILE\n")
        return 2
    Path(arguments[0]).write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
