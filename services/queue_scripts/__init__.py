"""The group queue's state changes, one Lua script each, run by the server as one step.

Promises
- Every script gets all keys of a run in one fixed order; all are in one hash slot (`{dgpo:RUN}`).
- Time is the server's. A script may be run twice with the same arguments without harm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import redis

Name = Literal[
    "issue",
    "admit",
    "renew",
    "release",
    "fail",
    "refuse",
    "read",
    "commit",
    "announce",
    "begin",
    "plan",
    "set_state",
    "status",
    "frontier",
    "leave",
]
Argument = str | bytes | int | float
INLINE, BESIDE = "inline", "beside"
"""Where the payload of a queued group lies: with its header, or, a large one, under a key of its own."""


@dataclass(frozen=True)
class Keys:
    """The keys of a run.

    >>> Keys("demo").groups
    '{dgpo:demo}:groups'
    """

    run: str

    def key(self, name: str) -> str:
        return f"{{dgpo:{self.run}}}:{name}"

    @property
    def groups(self) -> str:
        return self.key("groups")

    def payload(self, sha256: str) -> str:
        """Where the payload of a large group is."""
        return self.key(f"payload:{sha256}")

    @property
    def uploads(self) -> str:
        """Where leave to send a large payload is had."""
        return self.key("uploads")

    def call(self, worker: str) -> str:
        """Where a waiting worker is called."""
        return self.key(f"call:{worker}")

    @property
    def scripted(self) -> tuple[str, ...]:
        """In the order in which prelude.lua names them."""
        return tuple(map(self.key, _SCRIPTED))


_SCRIPTED = (
    "policy",
    "groups",
    "queued",
    "leases",
    "lease",
    "attempts",
    "again",
    "trained",
    "dead",
    "dead_ordinals",
    "weights",
    "latest",
    "lineage",
    "line",
    "called",
    "issued",
    "plan",
    "uploads",
)


@cache
def _source(name: Name) -> tuple[str, str]:
    folder = resources.files(__package__)
    first_line, _, body = folder.joinpath(f"{name}.lua").read_text().partition("\n")
    # The first line (#!lua flags=...) must stay the first.
    text = "\n".join([first_line, folder.joinpath("prelude.lua").read_text(), body])
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class Scripts:
    """Runs the scripts of one run on one server, loading each when the server does not know it."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        # redis-py types each answer as a union over protocols and decodings; ours is fixed by `connect`.
        self._client: Any = client
        self._keys = tuple(key.encode() for key in keys.scripted)

    def run(self, name: Name, *arguments: Argument) -> Any:
        text, sha = _source(name)
        try:
            return self._client.evalsha(sha, len(self._keys), *self._keys, *arguments)
        except redis.exceptions.NoScriptError:
            self._client.script_load(text)
            return self._client.evalsha(sha, len(self._keys), *self._keys, *arguments)

    def queue(self, pipeline: Any, name: Name, arguments: Sequence[Argument], *extra_keys: str) -> None:
        """Append a call to a pipeline, for `send`."""
        keys = (*self._keys, *extra_keys)
        pipeline.evalsha(_source(name)[1], len(keys), *keys, *arguments)

    def send(self, pipeline_of: Callable[[], Any], name: Name) -> list[Any]:
        """Everything in a pipeline that calls this script, in one go; an answer may be an exception.

        Args:
            pipeline_of: fills a pipeline; called again when the server did not know the script. What it
                sends must bear being sent twice.
        """
        answers: list[Any] = pipeline_of().execute(raise_on_error=False)
        if any(isinstance(answer, redis.exceptions.NoScriptError) for answer in answers):
            self._client.script_load(_source(name)[0])
            answers = pipeline_of().execute(raise_on_error=False)
        return answers
