"""The HTTP application of the run page: FastAPI, without Ray; every route reads.

Promises
- Whatever is asked, access.py has been asked first; there are no pages of documentation and no other routes.
- Nothing from a client becomes a file name: groups, runs and charts are looked up by what is known of them.
- The page itself is the same for every run but for its name; all else comes as JSON and is set as text.

Served by plain uvicorn (`dgpo ui`) and by Ray Serve (serve_app.py) alike.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, PackageLoader, StrictUndefined

from services.config_file import ConfigError
from services.ui.access import LOOPBACK_NAMES, Access
from services.ui.charts import MOST_POINTS, Chart, charts_of, curves_of
from services.ui.difference import differences, flat_config
from services.ui.gallery import SMALL_SIDE
from services.ui.stream import events
from services.ui.tail import Cursor
from services.ui.watch import Watch

STATIC: Final = Path(__file__).parent / "static"
REPORT_CSS: Final = Path(__file__).parent.parent / "report" / "report.css"
KEPT_CURVES = 64
Step = Annotated[int | None, Query(ge=0)]


def create_app(
    watch: Watch,
    *,
    token: str,
    compare: Mapping[str, Path] | None = None,
    hosts: Iterable[str] = LOOPBACK_NAMES,
    any_address: bool = False,
) -> Access:
    """The page of a run.

    Args:
        watch: started and stopped with the application.
        token: what everybody has to bring.
        compare: name -> directory of runs whose configuration may be compared with this one's.
        hosts, any_address: what the page answers to (access.py).
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await watch.start()
        try:
            yield
        finally:
            await watch.stop()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _page(app, watch)
    _numbers(app, watch)
    _groups(app, watch)
    _configuration(app, watch, dict(compare or {}))
    return Access(app, token=token, hosts=hosts, any_address=any_address)


def _page(app: FastAPI, watch: Watch) -> None:
    environment = Environment(
        loader=PackageLoader("services.ui", package_path=""), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("page.html.j2").render(name=watch.run.name)

    @app.get("/")
    async def show() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/static/report.css")
    async def css_of_the_report() -> FileResponse:
        return FileResponse(REPORT_CSS, headers={"cache-control": "no-cache"})

    app.mount("/static", _Static(directory=STATIC), name="static")

    @app.get("/api/run")
    async def about() -> dict[str, Any]:
        config = watch.config
        about: dict[str, Any] = {
            "name": watch.run.name,
            "version": importlib.metadata.version("dgpo-cluster"),
            "config_error": watch.config_error,
        }
        if config is not None:
            about |= {
                "model": f"{config.model.path}, {'LoRA' if config.model.train == 'lora' else 'full'}",
                "seed": config.run.seed,
                "tiny": max(config.model.width, config.model.height) <= SMALL_SIDE,
                "samples_every": config.telemetry.samples_every,
                "max_staleness": config.queue.max_staleness,
                "groups_per_step": config.learner.groups_per_step,
                "group_size": config.rollout.group_size,
                "whole_step": config.advantage.std == "step",
            }
        return about


def _numbers(app: FastAPI, watch: Watch) -> None:
    held = {reward.name for reward in watch.config.rewards if reward.heldout} if watch.config else set[str]()
    curriculum = watch.config is not None and watch.config.prompts.curriculum.after > 0

    @app.get("/api/status")
    async def status() -> dict[str, Any]:
        watch.looked_at()
        return watch.told_status()

    @app.get("/api/told")
    def told() -> dict[str, Any]:
        tail = watch.tail
        return {
            "events": [row.model_dump(exclude={"kind"}) for row in reversed(tail.events())],
            "events_seen": tail.events_seen,
            "letters": [row.model_dump(exclude={"kind"}) for row in reversed(tail.letters())],
            "letters_seen": tail.letters_seen,
            "unreadable": tail.unreadable,
            "memory": tail.memory.parts if tail.memory else {},
            "times": watch.times(),
        }

    # What has been worked out is kept until there is more: many may watch the same run.
    @lru_cache(maxsize=1)
    def listed(at: tuple[Cursor, int]) -> tuple[dict[str, Chart], list[int]]:
        evals = watch.tail.evals()
        with watch.tail.columns() as columns:
            found = charts_of(columns, evals, held, curriculum=curriculum)
            return {chart.key: chart for chart in found}, columns.resumes()

    @lru_cache(maxsize=KEPT_CURVES)
    def drawn(at: tuple[Cursor, int], chart: Chart, first: int | None, last: int | None, most: int) -> bytes:
        evals = watch.tail.evals()
        with watch.tail.columns() as columns:
            found = curves_of(chart, columns, evals, first=first, last=last, most=most)
        return json.dumps(found, allow_nan=False, separators=(",", ":")).encode()

    def now() -> tuple[Cursor, int]:
        return watch.tail.cursor, watch.tail.told

    @app.get("/api/charts")
    def charts() -> dict[str, Any]:
        found, resumes = listed(now())
        return {"charts": [asdict(chart) for chart in found.values()], "resumes": resumes}

    @app.get("/api/charts/{key}")
    def curves(
        key: str, first: Step = None, last: Step = None, most: Annotated[int, Query(ge=4)] = MOST_POINTS
    ) -> Response:
        at = now()
        chart = listed(at)[0].get(key)
        if chart is None:
            raise HTTPException(404, "There is no such chart.")
        return Response(drawn(at, chart, first, last, most), media_type="application/json")

    @app.get("/api/stream")
    async def stream(request: Request, after: str = "") -> StreamingResponse:
        known = Cursor.parse(request.headers.get("last-event-id") or after)
        return StreamingResponse(
            events(watch, known),
            media_type="text/event-stream",
            # Nginx and its like would else gather what is meant to flow.
            headers={"x-accel-buffering": "no"},
        )


def _groups(app: FastAPI, watch: Watch) -> None:
    # One thread: whoever scrolls through large images takes nothing from those who ask for numbers.
    drawing = ThreadPoolExecutor(1, "images")

    @app.get("/api/groups")
    def groups(first: Annotated[int, Query(ge=0)] = 0, count: int = 12, step: Step = None) -> dict[str, Any]:
        return watch.gallery.page(first if step is None else watch.gallery.place_of(step), count)

    @app.get("/api/groups/{key}/{place}")
    async def image(key: str, place: int, v: str = "") -> Response:
        found = await asyncio.get_running_loop().run_in_executor(drawing, watch.gallery.image, key, place)
        if found is None:
            raise HTTPException(404, "There is no such image.")
        kind, data = found
        # Its address has the time it was written.
        kept = "private, max-age=3600" if v else "no-store"
        return Response(data, media_type=kind, headers={"cache-control": kept})


def _configuration(app: FastAPI, watch: Watch, compare: dict[str, Path]) -> None:
    @lru_cache(maxsize=64)
    def flat(run_dir: Path, changed: int) -> dict[str, str]:
        return flat_config(run_dir)

    def known(run_dir: Path) -> dict[str, str]:
        try:
            return flat(run_dir, (run_dir / "config.yaml").stat().st_mtime_ns)
        except OSError as error:
            raise ConfigError(f"{run_dir}: {error}") from error

    @app.get("/api/config")
    def config(against: str = "") -> dict[str, Any]:
        try:
            here = known(watch.run.root)
            other = known(compare[against]) if against else None
        except KeyError:
            raise HTTPException(404, "The page was started without that run to compare with.") from None
        except ConfigError as error:
            return {"problem": str(error), "others": list(compare), "keys": [], "changes": []}
        return {
            "problem": "",
            "others": list(compare),
            "keys": list(here.items()),
            "changes": [asdict(change) for change in differences(here, other)] if other else [],
        }


class _Static(StaticFiles):
    """Asked for anew each time, and answered with 304 where nothing has changed: an update shows at once."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        answer = super().file_response(*args, **kwargs)
        answer.headers["cache-control"] = "no-cache"
        return answer
