"""An OpenAI-compatible judge on loopback that answers, and fails, on cue."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from fastapi import FastAPI, Request, Response

KEY = "the-judge's-key"
MODEL = "CodeGoat24/UnifiedReward-7b-v1.5"


def completion(content: str | None, **choice: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **choice.pop("message", {})}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}],
    }


class Judge:
    """Answers by the caption's cue and remembers what it was asked."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.bodies: list[dict[str, Any]] = []
        self.asked: Counter[str] = Counter()
        self.models = [MODEL, "another"]
        self.in_flight = self.most_in_flight = 0
        self.crowd = 0
        self.retry_after = "7"
        self._enough: asyncio.Event | None = None
        self._too_many: asyncio.Event | None = None
        self.app.get("/v1/models")(self._models)
        self.app.post("/v1/chat/completions")(self._chat)
        self.app.get("/elsewhere/models")(self._elsewhere)

    def _known(self, request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {KEY}"

    def _refuse(self, request: Request) -> Response:
        given = request.headers.get("authorization", "nothing")
        return Response(json.dumps({"error": {"message": f"unknown key: {given}"}}), 401)

    async def _models(self, request: Request) -> Any:
        if not self._known(request):
            return self._refuse(request)
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}

    async def _elsewhere(self) -> Response:
        return Response(status_code=307, headers={"Location": "/v1/models"})

    async def _chat(self, request: Request) -> Any:
        if not self._known(request):
            return self._refuse(request)
        body = await request.json()
        self.bodies.append(body)
        text = body["messages"][0]["content"][1]["text"]
        match = re.search(r"Text Caption: \[(.*)\]$", text)
        assert match is not None
        cue = match.group(1)
        self.asked[cue] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._answers().get(cue, self._score)(request, cue)
        finally:
            self.in_flight -= 1

    def _answers(self) -> dict[str, Callable[[Request, str], Awaitable[Any]]]:
        return {
            "500 once": self._once(Response("oops", 500)),
            "429 once": self._once(Response("{}", 429, {"Retry-After": self.retry_after})),
            "500 always": self._always(Response("oops", 500)),
            "400": self._always(Response('{"error": {"message": "image too large"}}', 400)),
            "html": self._always(Response("<html>a proxy's page</html>", 200, media_type="text/html")),
            "redirect": self._always(Response(status_code=307, headers={"Location": "/v1/chat/completions"})),
            "no choices": self._always({"choices": []}),
            "parts": self._always({"choices": [{"message": {"content": [{"type": "text"}]}}]}),
            "no match": self._always(completion("A fine picture of a cat.")),
            "refusal": self._always(completion(None, message={"refusal": "I will not rate this."})),
            "filtered": self._always(completion("Final Score: 4", finish_reason="content_filter")),
            "silent": self._always(completion("  \n")),
            "cut": self._always(completion("Good. Final Score: 4", finish_reason="length")),
            "hang": self._hang,
            "crowd": self._crowd,
        }

    def _always(self, answer: Any) -> Callable[[Request, str], Awaitable[Any]]:
        async def give(request: Request, cue: str) -> Any:
            return answer

        return give

    def _once(self, answer: Any) -> Callable[[Request, str], Awaitable[Any]]:
        async def give(request: Request, cue: str) -> Any:
            return answer if self.asked[cue] == 1 else await self._score(request, "4")

        return give

    async def _score(self, request: Request, cue: str) -> dict[str, Any]:
        return completion(f"The image follows its caption.\nFinal Score: {cue}")

    async def _hang(self, request: Request, cue: str) -> Response:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        return Response(status_code=499)

    async def _crowd(self, request: Request, cue: str) -> Any:
        """Holds the first `crowd` requests until one too many has come, or plainly will not."""
        if self._enough is None or self._too_many is None:
            self._enough, self._too_many = asyncio.Event(), asyncio.Event()
        if self.in_flight > self.crowd:
            self._too_many.set()
        if self.in_flight == self.crowd and not self._enough.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._too_many.wait(), 0.3)
            self._enough.set()
        await self._enough.wait()
        return await self._score(request, "3")
