"""Server-sent events: rows as they come, what was missed, resumes, signs of life."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.metrics import EventRow
from services.run_directory import RunDirectory
from services.ui import stream
from services.ui import watch as watch_module
from services.ui.stream import events
from services.ui.tail import Cursor
from services.ui.watch import Watch
from tests.unit.services.ui.made_runs import a_run, append, evaluation, keep_group, update
from tests.unit.services.ui.page_support import until, watched


class News:
    """One client: what it is told, by kind."""

    def __init__(self, watch: Watch, after: Cursor | None = None) -> None:
        self._texts: AsyncIterator[str] = events(watch, after)
        self.last_id = ""

    async def next(self, kind: str) -> Any:
        """The data of the next news of that kind."""
        async for text in self._texts:
            fields = dict(line.split(": ", 1) for line in text.strip().splitlines())
            self.last_id = fields.get("id", self.last_id)
            if fields.get("event") == kind:
                return json.loads(fields["data"])
        raise AssertionError(f"the stream has ended without {kind}")

    @property
    def cursor(self) -> Cursor | None:
        return Cursor.parse(self.last_id)


async def test_rows_are_told_as_they_are_written(run: RunDirectory) -> None:
    append(run, [update(1), update(2)])
    async with watched(run) as watch:
        client = News(watch)
        assert (await client.next("reset"))["step"] == 2
        append(run, [update(3), update(4, reward=0.75)])
        rows = await client.next("rows")
        assert rows["columns"]["step"] == [3, 4]
        assert rows["columns"]["reward_mean"] == [0.5, 0.75]
        assert rows["step"] == 4
        assert ["updates", "4"] in rows["facts"]


async def test_a_line_that_is_not_whole_is_not_told(run: RunDirectory) -> None:
    append(run, [update(1)])
    path = run.root / "metrics.jsonl"
    line = update(2).model_dump_json() + "\n"
    async with watched(run) as watch:
        client = News(watch)
        await client.next("reset")
        with path.open("a") as file:
            file.write(line[:30])
        size = path.stat().st_size
        await until(watch, lambda: watch.tail.bytes_read == size)
        assert watch.tail.cursor == client.cursor
        with path.open("a") as file:
            file.write(line[30:])
        assert (await client.next("rows"))["columns"]["step"] == [2]


async def test_who_comes_back_is_told_what_was_missed(run: RunDirectory) -> None:
    append(run, [update(1)])
    async with watched(run) as watch:
        client = News(watch)
        await client.next("reset")
        append(run, [update(2), EventRow(time=1.0, what="worker died"), update(3)])
        await until(watch, lambda: watch.facts()["step"] == 3)
        again = News(watch, client.cursor)
        assert (await again.next("rows"))["columns"]["step"] == [2, 3]
        assert again.cursor == watch.tail.cursor


@pytest.mark.parametrize("known", [Cursor(9, 10), Cursor(0, 10**9)])
async def test_who_knows_something_else_asks_anew(run: RunDirectory, known: Cursor) -> None:
    append(run, [update(1)])
    async with watched(run) as watch:
        assert (await News(watch, known).next("reset"))["step"] == 1


async def test_many_missed_rows_are_not_told_one_by_one(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MOST_ROWS", 2)
    append(run, [update(1)])
    async with watched(run) as watch:
        known = watch.tail.cursor
        append(run, map(update, range(2, 6)))
        await until(watch, lambda: watch.facts()["step"] == 5)
        assert (await News(watch, known).next("reset"))["step"] == 5


async def test_a_resume_makes_everybody_ask_anew(run: RunDirectory) -> None:
    append(run, map(update, range(1, 5)))
    async with watched(run) as watch:
        client = News(watch)
        await client.next("reset")
        append(run, [update(3, epoch=1)])
        assert (await client.next("reset"))["step"] == 3


async def test_evaluations_and_groups_are_news(run: RunDirectory) -> None:
    async with watched(run) as watch:
        client = News(watch)
        await client.next("told")
        append(run, [evaluation(0, "before")])
        assert await client.next("told") == {}
        keep_group(run, 1, 8, [0.1, 0.9])
        assert await client.next("groups") == {"total": 1}


async def test_a_sign_of_life_comes_when_there_is_no_news(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_S", 0.05)
    async with watched(run) as watch:
        async for text in events(watch, None):
            if text == ": still here\n\n":
                return


async def test_streams_end_with_the_page(run: RunDirectory) -> None:
    async with watched(run) as watch:
        client = events(watch, None)
        assert (await anext(client)).startswith("retry: ")
        watch.close_soon()
        rest = [text async for text in client]
        assert watch.closed
        assert not any(text.startswith("retry") for text in rest)


async def test_one_reading_serves_all_clients(run: RunDirectory) -> None:
    append(run, map(update, range(1, 5)))
    async with watched(run) as watch:
        clients = [News(watch) for _ in range(8)]
        for client in clients:
            await client.next("reset")
        append(run, [update(5)])
        for client in clients:
            assert (await client.next("rows"))["columns"]["step"] == [5]
        assert watch.tail.bytes_read == (run.root / "metrics.jsonl").stat().st_size


async def test_what_cannot_be_asked_is_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run of another version, say."""
    run = a_run(tmp_path)
    append(run, [update(1)])

    def cannot(*_: object, **__: object) -> None:
        raise ValueError("no such field")

    monkeypatch.setattr(watch_module, "STATUS_S", 0.05)
    monkeypatch.setattr(watch_module, "GROUPS_S", 0.05)
    async with watched(run) as watch:
        monkeypatch.setattr(watch_module, "status_with", cannot)
        monkeypatch.setattr(watch.gallery, "refresh", cannot)
        watch.looked_at()
        await until(watch, lambda: "no such field" in watch.told_status()["problem"])
        append(run, [update(2)])
        await until(watch, lambda: len(watch.tail.recent()) == 2)
        monkeypatch.undo()  # the waits too: nothing below depends on them
        watch.looked_at()
        await until(watch, lambda: watch.told_status()["problem"] == "")
        keep_group(run, 1, 8, [0.1, 0.9])
        await until(watch, lambda: len(watch.gallery) == 1)
