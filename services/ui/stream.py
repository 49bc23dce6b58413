"""Server-sent events: a page is told what is new, and only that.

Promises
- Rows go out as they are appended; who reconnects with the id it was last told gets what it has missed. Where
  that is too much, or what it knows has changed (a resume), it is told to ask anew.
- A client that reads slowly holds nothing up and piles nothing up: it is told from what is there then.
- A sign of life every HEARTBEAT_S, by which proxies and browsers see that the connection lives.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from services.ui.tail import Cursor
from services.ui.watch import Look, Watch

HEARTBEAT_S = 15.0
MOST_ROWS = 1000
"""Told one by one; more are fetched as thinned curves."""
RECONNECT_MS = 2000
NOTHING = Cursor(0, 0)


async def events(watch: Watch, after: Cursor | None) -> AsyncIterator[str]:
    """The stream of one client.

    Args:
        after: the id it was last told, of this server or a former one; None: it has nothing yet.
    """
    yield f"retry: {RECONNECT_MS}\n\n"
    client = _Client(watch, after)
    while not watch.closed:
        watch.looked_at()
        look = watch.look()
        for text in client.news(look):
            yield text
        if not await watch.news_since(look, HEARTBEAT_S):
            yield ": still here\n\n"


class _Client:
    """What one client has been told."""

    def __init__(self, watch: Watch, after: Cursor | None) -> None:
        self._watch = watch
        self._told: Look | None = None
        self._cursor = after

    def news(self, look: Look) -> Iterator[str]:
        told = self._told
        if look.reading is not None:
            if told is None or told.reading != look.reading:
                yield _event("reading", {"percent": look.reading})
        elif self._cursor is None or self._cursor != look.cursor:
            yield from self._rows()
        if told is None or told.status != look.status:
            yield _event("status", self._watch.told_status())
        if told is None or told.told != look.told:
            yield _event("told", {})
        if told is None or told.groups != look.groups:
            yield _event("groups", {"total": len(self._watch.gallery)})
        self._told = look

    def _rows(self) -> Iterator[str]:
        now, rows = self._watch.tail.rows_after(self._cursor or NOTHING, MOST_ROWS)
        if self._cursor is None or rows is None:
            yield _event("reset", self._watch.facts(), now)
        elif rows["step"]:
            yield _event("rows", {"columns": rows, **self._watch.facts()}, now)
        self._cursor = now


def _event(kind: str, data: Any, cursor: Cursor | None = None) -> str:
    named = f"id: {cursor}\n" if cursor is not None else ""
    return f"{named}event: {kind}\ndata: {json.dumps(data, allow_nan=False)}\n\n"
