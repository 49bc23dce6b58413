"""The routes of the run page: what they tell, what they escape, and how much work they do for it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import httpx

from services.metrics import EventRow
from services.run_directory import RunDirectory
from services.telemetry import METRICS_FILE
from services.ui.charts import MOST_POINTS
from services.ui.gallery import MOST_ON_A_PAGE
from tests.unit.services.ui.made_runs import HOSTILE, a_run, append, evaluation, keep_group, long_run, update
from tests.unit.services.ui.page_support import page_of, until, watched


async def test_the_page_of_a_run_that_has_not_begun(run: RunDirectory) -> None:
    async with watched(run) as watch, page_of(watch) as client:
        page = await client.get("/")
        assert run.name in page.text
        assert (await client.get("/api/status")).json()["step"] == 0
        assert [chart["key"] for chart in (await client.get("/api/charts")).json()["charts"]] == ["reward"]
        assert (await client.get("/api/charts/reward")).json()["curves"][0]["x"] == []
        assert (await client.get("/api/groups")).json() == {"total": 0, "first": 0, "groups": []}
        assert (await client.get("/api/told")).json()["events"] == []


async def test_a_run_is_told(run: RunDirectory) -> None:
    rows = [evaluation(0, "before", score=0.4), *map(update, range(1, 7)), evaluation(6, score=0.8)]
    append(run, [*rows, EventRow(time=5.0, what="dead letter", detail="reward ocr: gone", ordinal=7)])
    async with watched(run) as watch, page_of(watch) as client:
        status = (await client.get("/api/status")).json()
        assert (status["step"], status["max_steps"]) == (6, 40)
        assert ["images", "768"] in status["facts"]
        charts = {chart["key"]: chart for chart in (await client.get("/api/charts")).json()["charts"]}
        assert {"reward", "heldout", "staleness", "queue", "seconds", "loss"} <= set(charts)
        assert "kl" not in charts
        total, tesseract = charts["reward"]["curves"]
        assert (total["column"], total["spread"]) == ("reward_mean", "reward_std")
        assert (tesseract["name"], tesseract["dashed"]) == ("tesseract", True)
        reward = (await client.get("/api/charts/reward?first=2&last=4")).json()
        assert reward["curves"][0] == {
            "x": [2, 3, 4],
            "y": [0.5, 0.5, 0.5],
            "low": {"x": [2, 3, 4], "y": [0.4, 0.4, 0.4]},
            "high": {"x": [2, 3, 4], "y": [0.6, 0.6, 0.6]},
        }
        heldout = (await client.get("/api/charts/heldout")).json()["curves"]
        assert heldout == [{"x": [0, 6], "y": [0.4, 0.8], "error": [0.01, 0.01]}]
        told = (await client.get("/api/told")).json()
        assert [letter["ordinal"] for letter in told["letters"]] == [7]
        assert told["times"][0]["title"] == "An update of the learner"
        assert (await client.get("/api/charts/none")).status_code == 404
        assert (await client.get("/api/charts/reward?first=-1")).status_code == 422
        assert (await client.get("/nothing")).status_code == 404
        for documentation in ("/docs", "/redoc", "/openapi.json"):
            assert (await client.get(documentation)).status_code == 404


async def test_text_of_prompts_is_json_and_the_page_holds_none(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    keep_group(run, 1, 8, [0.1, 0.9], prompt=HOSTILE)
    append(run, [update(1), EventRow(time=1.0, what="dead letter", detail=HOSTILE)])
    async with watched(run) as watch, page_of(watch) as client:
        groups = await client.get("/api/groups")
        assert groups.headers["content-type"] == "application/json"
        assert groups.json()["groups"][0]["prompt"] == HOSTILE
        page = await client.get("/")
        assert HOSTILE not in page.text
        for line in page.text.splitlines():
            assert "<script" not in line or 'src="static/' in line
            assert " style=" not in line
            assert " onload=" not in line


async def test_a_name_of_a_run_is_escaped(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    renamed = run.root.rename(tmp_path / "<b>bold & co")
    async with watched(RunDirectory(renamed)) as watch, page_of(watch) as client:
        page = (await client.get("/")).text
        assert "<b>" not in page
        assert "&lt;b&gt;bold &amp; co" in page


async def test_a_run_whose_configuration_is_of_another_version_is_shown(run: RunDirectory) -> None:
    run.config_file.write_text(run.config_file.read_text() + "\nsurprise: 1\n")
    append(run, [update(1)])
    keep_group(run, 1, 8, [0.1, 0.9])
    async with watched(run) as watch, page_of(watch) as client:
        assert "surprise" in (await client.get("/api/run")).json()["config_error"]
        assert (await client.get("/api/status")).json()["step"] == 1
        assert (await client.get("/api/groups")).json()["groups"][0]["problem"]
        assert ["surprise", "1"] in (await client.get("/api/config")).json()["keys"]


async def test_images_are_looked_up_and_never_named(run: RunDirectory) -> None:
    keep_group(run, 1, 8, [0.1, 0.9])
    async with watched(run) as watch, page_of(watch) as client:
        group = (await client.get("/api/groups")).json()["groups"][0]
        image = await client.get(f"/api/groups/{group['key']}/1?v={group['changed']}")
        assert image.headers["content-type"] == "image/png"
        assert image.content.startswith(b"\x89PNG")
        assert image.headers["cache-control"] == "private, max-age=3600"
        for wrong in ("1-000008/2", "1-000008/-1", "9-000009/0", "..%2f..%2fconfig/0", "1-000008/x"):
            assert (await client.get(f"/api/groups/{wrong}")).status_code in (404, 422)
        for secret in ("/static/../access.py", "/static/%2e%2e/access.py", "/static//etc/passwd"):
            assert (await client.get(secret)).status_code == 404


async def test_long_runs_are_answered_from_what_is_read_once(tmp_path: Path) -> None:
    updates, groups = 100_000, 10_000
    run = long_run(tmp_path, updates=updates, groups=groups)
    size = (run.root / METRICS_FILE).stat().st_size
    async with watched(run) as watch, page_of(watch) as client:
        await until(watch, lambda: len(watch.gallery) == groups)
        for _ in range(3):
            for key in ("reward", "loss", "staleness"):
                curves = (await client.get(f"/api/charts/{key}?most=100000")).json()
                assert curves["rows"] == updates
                assert all(len(curve["x"]) <= MOST_POINTS for curve in curves["curves"])
            part = (await client.get("/api/charts/reward?first=501&last=1500")).json()["curves"][1]
            assert part["x"] == list(range(501, 1501))
            assert (await client.get("/api/status")).json()["step"] == updates
        for first in (0, 5000, 9990):
            page = (await client.get(f"/api/groups?first={first}&count=1000")).json()
            assert page["total"] == groups
            assert len(page["groups"]) == min(MOST_ON_A_PAGE, groups - first)
        assert watch.tail.bytes_read == size
        assert watch.gallery.folders_listed == groups
        assert watch.gallery.groups_read == 2 * MOST_ON_A_PAGE + 10
        append(run, [update(updates + 1)])
        keep_group(run, groups, groups, [0.1, 0.9])
        await until(watch, lambda: len(watch.gallery) == groups + 1)
        await until(watch, lambda: watch.facts()["step"] == updates + 1)
        assert watch.tail.bytes_read == (run.root / METRICS_FILE).stat().st_size
        assert watch.gallery.folders_listed == groups + 1


async def test_watching_changes_nothing(run: RunDirectory) -> None:
    append(run, [update(1)])
    keep_group(run, 1, 8, [0.1, 0.9])
    before = _state_of(run.root)
    async with watched(run) as watch, page_of(watch) as client:
        for path in ("/", "/api/run", "/api/status", "/api/charts/reward", "/api/told", "/api/groups"):
            assert (await client.get(path)).status_code == 200
        await client.get("/api/groups/1-000008/0")
        watch.looked_at()
        await until(watch, lambda: watch.told_status()["asked"] is not None)
        assert (await client.get("/api/status")).json()["status"]["state"] == "stopped"
    assert _state_of(run.root) == before


def _state_of(root: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


async def test_a_queue_that_cannot_be_reached_is_told_and_not_an_error(tmp_path: Path) -> None:
    run = a_run(tmp_path, "queue.url=redis://127.0.0.1:1/0")
    append(run, [update(1)])
    async with watched(run) as watch, page_of(watch) as client:
        watch.looked_at()
        await until(watch, lambda: watch.told_status()["asked"] is not None)
        status: httpx.Response = await client.get("/api/status")
        assert status.status_code == 200
        assert status.json()["status"] is None
        assert "127.0.0.1:1" in status.json()["problem"]
        assert status.json()["step"] == 1
