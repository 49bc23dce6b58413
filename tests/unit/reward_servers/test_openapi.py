"""docs/openapi/reward-v1.json says what the server does: it is generated, whole, and of the right types."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from reward_servers.openapi import document, main
from reward_servers.protocol import (
    HEALTH_PATH,
    INFO_PATH,
    JSON_TYPE,
    SCORE_PATH,
    STATUS_NAMES,
    TENSOR_TYPE,
    ScoreRequest,
)
from services.config_file import PROJECT_ROOT

FILE = PROJECT_ROOT / "docs" / "openapi" / "reward-v1.json"


@pytest.fixture(scope="module")
def committed() -> Any:
    return json.loads(FILE.read_text(encoding="utf-8"))


def test_the_committed_file_is_the_one_that_make_docs_writes(tmp_path: Any) -> None:
    assert main([str(tmp_path / "made.json")]) == 0
    assert (tmp_path / "made.json").read_bytes() == FILE.read_bytes(), "run: make docs"


def test_the_command_asks_for_a_file() -> None:
    assert main([]) == 2


def test_it_has_every_path_body_and_status(committed: Any) -> None:
    assert set(committed["paths"]) == {SCORE_PATH, INFO_PATH, HEALTH_PATH}
    score = committed["paths"][SCORE_PATH]["post"]
    assert set(score["requestBody"]["content"]) == {JSON_TYPE, TENSOR_TYPE}
    # 404 and 405 belong to no path's operation.
    statuses = {str(status) for status in STATUS_NAMES} - {"404", "405"}
    assert set(score["responses"]) == statuses | {"200", "default"}
    for status, response in score["responses"].items():
        kind = "ScoreResponse" if status == "200" else "ErrorBody"
        assert response["content"][JSON_TYPE]["schema"] == {"$ref": f"#/components/schemas/{kind}"}


def test_every_path_but_health_asks_for_the_token(committed: Any) -> None:
    asked = {
        path: bool(operation["security"])
        for path, methods in committed["paths"].items()
        for operation in methods.values()
    }
    assert asked == {SCORE_PATH: True, INFO_PATH: True, HEALTH_PATH: False}
    assert committed["components"]["securitySchemes"] == {"BearerToken": {"type": "http", "scheme": "bearer"}}


def _references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(_references, value.values()))
    return set().union(*map(_references, value)) if isinstance(value, list) else set()


def test_every_reference_leads_somewhere(committed: Any) -> None:
    schemas = committed["components"]["schemas"]
    names = {reference.removeprefix("#/components/schemas/") for reference in _references(committed)}
    assert names and names <= set(schemas)
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("body", "valid"),
    [
        ({"images": ["aGk="], "prompts": "p"}, True),
        ({"images": ["aGk="], "prompts": ["p"], "metadata": [{"tag": "counting", "n": [1, None]}]}, True),
        ({"images": [], "prompts": "p"}, False),
        ({"images": ["aGk="]}, False),
        ({"images": ["aGk="], "prompts": 1}, False),
        ({"images": ["aGk="], "prompts": "p", "seed": 1}, False),
    ],
)
def test_its_request_schema_takes_what_the_model_takes(body: Any, valid: bool) -> None:
    schema = {"$ref": "#/components/schemas/ScoreRequest", **document()}
    assert Draft202012Validator(schema).is_valid(body) is valid
    if body.get("images"):
        assert _model_takes(body) is valid


def _model_takes(body: Any) -> bool:
    try:
        ScoreRequest.model_validate_json(json.dumps(body))
    except ValueError:
        return False
    return True
