"""What may not be said in protocol v1."""

import pytest
from pydantic import ValidationError

from reward_servers.protocol import ItemError, ProtocolError, ScoreResponse

ANSWER = {"reward": "ocr", "model": "m", "version": "1"}


def test_a_response_round_trips() -> None:
    answer = ScoreResponse(
        scores=(0.5, None), details=({"text": "a"}, {}), errors=(ItemError(index=1, error="why"),), **ANSWER
    )
    assert ScoreResponse.model_validate_json(answer.model_dump_json()) == answer


@pytest.mark.parametrize(
    "wrong",
    [
        '{"scores": [NaN], "details": [{}]}',
        '{"scores": [Infinity], "details": [{}]}',
        '{"scores": [null], "details": [{}]}',
        '{"scores": [0.5], "details": [{}], "errors": [{"index": 0, "error": "scored and failed"}]}',
        '{"scores": [0.5], "details": []}',
        '{"scores": ["high"], "details": [{}]}',
        '{"scores": [0.5], "details": [{}], "extra": 1}',
    ],
)
def test_a_score_is_finite_or_an_error_that_is_named(wrong: str) -> None:
    right = wrong[:-1] + ', "reward": "ocr", "model": "m", "version": "1"}'
    with pytest.raises(ValidationError):
        ScoreResponse.model_validate_json(right)


def test_an_error_names_its_status() -> None:
    assert ProtocolError(413, "too long").body.model_dump() == {"error": "too_large", "detail": "too long"}
