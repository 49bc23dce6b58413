"""The group queue's state changes, one Lua script each, run by the server as one step.

Promises
- Every script gets all keys of a run in one fixed order; all are in one hash slot (`{dgpo:RUN}`).
- Time is the server's. A script may be run twice with the same arguments without harm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
    "commit",
    "announce",
    "begin",
    "set_state",
    "status",
]
Argument = str | bytes | int | float


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
    "wake",
    "issued",
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
        self._client = client
        self._keys = keys.scripted

    def run(self, name: Name, *arguments: Argument) -> Any:
        text, sha = _source(name)
        try:
            return self._client.evalsha(sha, len(self._keys), *self._keys, *arguments)
        except redis.exceptions.NoScriptError:
            self._client.script_load(text)
            return self._client.evalsha(sha, len(self._keys), *self._keys, *arguments)

    def run_many(self, name: Name, calls: Sequence[Sequence[Argument]]) -> list[Any]:
        """The same script for several arguments, sent in one go; each answer may be an exception."""
        text, sha = _source(name)
        for _ in range(2):
            pipeline = self._client.pipeline(transaction=False)
            for arguments in calls:
                pipeline.evalsha(sha, len(self._keys), *self._keys, *arguments)
            answers = pipeline.execute(raise_on_error=False)
            if not isinstance(answers[0], redis.exceptions.NoScriptError):
                break
            self._client.script_load(text)
        return answers
