"""The application of the run page without a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from services.run_directory import RunDirectory
from services.ui.app import create_app
from services.ui.watch import Watch
from tests.unit.services.ui.made_runs import TOKEN

WAIT_S = 120.0


@asynccontextmanager
async def watched(run: RunDirectory) -> AsyncIterator[Watch]:
    """Looked at; its metrics are read and its groups listed."""
    watch = Watch(run)
    await watch.start()
    try:
        groups = any(run.samples.glob("step-*/group-*.json"))
        await until(watch, lambda: watch.look().reading is None and len(watch.gallery) >= groups)
        yield watch
    finally:
        await watch.stop()


async def until(watch: Watch, holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():
            await watch.news_since(watch.look(), 1.0)


@asynccontextmanager
async def page_of(watch: Watch, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client that has the token."""
    transport = httpx.ASGITransport(app=create_app(watch, token=TOKEN, **options))
    headers = {"authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
        yield client
