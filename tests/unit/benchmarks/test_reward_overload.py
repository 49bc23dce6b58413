"""What becomes of a request in the overload: an answer is right, wrong, or none."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from benchmarks import reward_overload
from benchmarks.reward_overload import Answers
from benchmarks.reward_servers import Served


def scored(number: int, times: int = 1) -> httpx.Response:
    return httpx.Response(200, json={"details": [{"id": str(number), "times": times}]})


def shed(headers: dict[str, str] | None = None, body: Any = None) -> httpx.Response:
    told = {"error": "overloaded", "detail": "16 wait already"} if body is None else body
    return httpx.Response(429, json=told, headers=headers or {})


def test_an_answer_is_scored_shed_or_wrong() -> None:
    answers = Answers()
    answers.take(1, scored(1), 0.5)
    answers.take(2, shed({"retry-after": "1"}), 0.1)
    answers.take(3, scored(1), 0.5)
    answers.take(4, scored(4, times=2), 0.5)
    answers.take(5, shed(), 0.1)
    answers.take(6, shed({"retry-after": "1"}, "busy"), 0.1)
    answers.take(7, httpx.Response(500, text="oops"), 0.1)
    assert (answers.scored, answers.shed, sorted(answers.wrong)) == ([1], [2], [3, 4, 5, 6, 7])
    assert answers.lost == {}
    assert answers.wrong[7] == "500 oops"


async def test_a_request_without_an_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three requests one is scored, one is answered wrongly, and one is not answered."""

    def answer(request: httpx.Request) -> httpx.Response:
        number = json.loads(
            json.loads(request.read()[8:].partition(b"}}")[0] + b"}}")["__metadata__"]["metadata"]
        )
        match int(number["id"]):
            case 0:
                return scored(0)
            case 1:
                return httpx.Response(500, text="oops")
            case _:
                raise httpx.ReadError("the connection broke")

    client = httpx.AsyncClient

    def over_no_network(**settings: Any) -> httpx.AsyncClient:
        return client(**settings, transport=httpx.MockTransport(answer))

    monkeypatch.setattr(reward_overload.httpx, "AsyncClient", over_no_network)
    answers = await reward_overload._send(Served("http://bench", "token"), 3, 1000.0)
    assert answers.scored == [0]
    assert answers.wrong == {1: "500 oops"}
    assert answers.lost == {2: "ReadError: the connection broke"}
    assert answers.examples == ["ReadError: the connection broke", "500 oops"]
