"""The run page in a real browser: live, in dark and light, on a phone, by keyboard, with hostile prompts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.embedded import EmbeddedValkey
from services.metrics import EventRow
from services.run_directory import RunDirectory
from tests.integration.test_run_page import live_queue, page_process
from tests.unit.services.ui.made_runs import HOSTILE, a_run, append, evaluation, keep_group, update

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed on this machine"),
]
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WAIT_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
        yield started
        started.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Still going on: 20 of 40 updates, kept groups, something given up."""
    run = a_run(tmp_path_factory.mktemp("runs"))
    append(
        run, [evaluation(0, "before", score=0.4), *(update(step, reward=step / 40) for step in range(1, 21))]
    )
    append(run, [EventRow(time=5.0, what="dead letter", detail=f"reward ocr: {HOSTILE}", ordinal=7)])
    keep_group(run, 0, 0, [0.25, 1.0, 0.0, 0.5], prompt=HOSTILE)
    keep_group(run, 10, 80, [0.25, 1.0, 0.0, 0.5], prompt="a sign that says “K10” " * 20)
    return run


@pytest.fixture(scope="module")
def address(run: RunDirectory) -> Iterator[str]:
    other = a_run(run.root.parent, "objective.beta=100")
    with EmbeddedValkey(run.queue) as server:
        live_queue(run, server)
        with page_process(str(run.root), "--compare", str(other.root)) as (_, told):
            yield told["address"]


class Visit:
    """One page in a context of its own; complaints of the browser fail the test."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.complaints: list[str] = []
        self.page.on("console", lambda said: said.type in ("error", "warning") and self._note(said.text))
        self.page.on("pageerror", lambda error: self._note(str(error)))
        self.page.on("dialog", lambda dialog: self._note(dialog.message))
        self.page.goto(address)

    def _note(self, text: str) -> None:
        self.complaints.append(text)

    def has_text(self, place: str, text: str) -> None:
        self.page.wait_for_function(
            "([place, text]) => document.querySelector(place)?.textContent.includes(text)", arg=[place, text]
        )

    def __enter__(self) -> Visit:
        self.has_text("#state", "running")
        self.page.wait_for_selector("[data-charts=reward] canvas")
        self.page.wait_for_selector("#gallery .group")
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()
        if error[0] is None:
            assert self.complaints == []


def test_what_the_page_shows(browser: Any, address: str, run: RunDirectory) -> None:
    with Visit(browser, address) as visit:
        page = visit.page
        assert "token" not in page.url
        cookie = visit.context.cookies()[0]
        assert cookie["httpOnly"]
        assert cookie["sameSite"] == "Strict"
        assert page.evaluate("document.cookie") == ""
        visit.has_text("#progress-text", "20 of 40 updates")
        visit.has_text("#workers-table", "sampling (ordinal 3)")
        visit.has_text("#workers-table", "0.3")
        visit.has_text("#letters-table", "reward ocr")
        visit.has_text("#difference-table", "objective.beta")
        assert page.locator("#gallery .group").count() == 2
        newest = page.locator("#gallery .group").first
        assert newest.locator(".member").count() == 2
        assert "1.000" in newest.locator(".member.best").inner_text()
        assert "0.000" in newest.locator(".member.worst").inner_text()
        page.wait_for_function(
            "() => [...document.querySelectorAll('#gallery img')].every((one) => one.naturalWidth === 64)"
        )


def test_hostile_text_stays_text(browser: Any, address: str, run: RunDirectory) -> None:
    with Visit(browser, address) as visit:
        page = visit.page
        assert page.locator("#gallery h3").nth(1).inner_text() == HOSTILE
        visit.has_text("#workers-table", HOSTILE)
        visit.has_text("#events-table", HOSTILE)
        assert page.locator("#gallery h3 *, td img, td script").count() == 0
        assert page.title().endswith(run.name)
        assert page.evaluate("typeof document.title") == "string"


def test_new_rows_and_groups_appear_by_themselves(browser: Any, address: str, run: RunDirectory) -> None:
    with Visit(browser, address) as visit:
        append(run, [update(step, reward=0.987) for step in range(21, 24)])
        visit.has_text("#progress-text", "23 of 40 updates")
        visit.has_text("[data-charts=reward]", "0.987")
        keep_group(run, 20, 160, [0.1, 0.9], prompt="a new one")
        visit.has_text("#gallery", "a new one")
        append(run, [evaluation(20, score=0.876)])
        visit.has_text("[data-charts=reward] figure:nth-of-type(2)", "0.876")


def test_the_whole_page_by_keyboard(browser: Any, address: str) -> None:
    with Visit(browser, address) as visit:
        page = visit.page

        def focused(question: str) -> Any:
            return page.evaluate(f"document.activeElement{question}")

        page.keyboard.press("Tab")
        assert focused(".textContent") == "Skip to the run"
        assert page.locator(".skip").bounding_box()["y"] >= 0
        page.keyboard.press("Enter")
        assert focused(".id") == "main"
        reached = []
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.append(focused(".className") or focused(".id") or focused(".textContent"))
            if focused(".className") == "plot":
                break
        assert {"All steps", "Last 1,000", "Last 100"} <= set(reached)
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
        page.keyboard.press("Home")
        visit.has_text("[data-charts=reward] .at", "step 1")
        page.keyboard.press("ArrowRight")
        visit.has_text("[data-charts=reward] .at", "step 2")
        page.keyboard.press("Escape")
        assert page.locator("[data-charts=reward] .at").first.inner_text() == ""
        page.locator("[data-last='100']").focus()
        page.keyboard.press("Enter")
        assert page.locator("[data-last='100']").get_attribute("aria-pressed") == "true"
        page.locator("#gallery summary").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("#gallery .members .member")


def test_a_chart_out_of_sight_keeps_no_other_from_being_read(browser: Any, address: str) -> None:
    """What it shows is of the former range then, and its cursor moves with the others."""
    with Visit(browser, address, viewport={"width": 600, "height": 300}) as visit:
        page = visit.page
        plots = page.locator("[data-charts] .plot")
        for place in range(plots.count()):
            plots.nth(place).scroll_into_view_if_needed()
            page.wait_for_function(
                "(at) => document.querySelectorAll('[data-charts] .plot')[at].firstChild", arg=place
            )
        page.locator("[data-last='100']").click()
        plots.first.scroll_into_view_if_needed()
        plots.first.hover()
        visit.has_text("[data-charts=reward] .at", "step")
        page.emulate_media(color_scheme="dark")


def test_a_chart_that_could_not_be_loaded_is_loaded_again(
    browser: Any, address: str, run: RunDirectory
) -> None:
    with Visit(browser, address) as visit:
        page = visit.page
        page.route("**/api/charts/**", lambda route: route.abort())
        page.locator("[data-last='100']").click()
        visit.has_text("#connection", "Connection lost")
        page.unroute("**/api/charts/**")
        visit.complaints.clear()
        append(run, [update(30, reward=0.777)])
        visit.has_text("[data-charts=reward]", "0.777")


def test_every_control_has_a_name(browser: Any, address: str) -> None:
    with Visit(browser, address) as visit:
        unnamed = visit.page.evaluate(
            """() => [...document.querySelectorAll("button, a, input, select, [tabindex='0'], img, progress")]
                 .filter((one) => !(one.textContent.trim() || one.ariaLabel || one.alt || one.labels?.length))
                 .map((one) => one.outerHTML)"""
        )
        assert unnamed == []
        assert visit.page.locator("h1").count() == 1
        assert visit.page.get_attribute("html", "lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_in_dark_and_light_on_a_phone_and_a_desk(
    browser: Any, address: str, tmp_path: Path, scheme: str, width: int
) -> None:
    context = {"color_scheme": scheme, "viewport": {"width": width, "height": 844}}
    with Visit(browser, address, **context) as visit:
        page = visit.page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 21, 23)"
        assert dark == (scheme == "dark")
        heights = page.evaluate(
            """() => [...document.querySelectorAll("button, select, input")]
                 .filter((one) => one.offsetParent).map((one) => one.getBoundingClientRect().height)"""
        )
        assert min(heights) >= (44 if width < 560 else 24)
        page.screenshot(path=tmp_path / f"page-{scheme}-{width}.png", full_page=True)
        assert (tmp_path / f"page-{scheme}-{width}.png").stat().st_size > 20_000


def test_without_the_token_there_is_a_sentence_and_no_page(browser: Any, address: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    answer = page.goto(address.partition("?")[0])
    assert answer.status == 401
    assert "Token needed" in page.inner_text("body")
    answer = page.goto(address.partition("?")[0] + "?token=wrong")
    assert answer.status == 401
    assert "not the one" in page.inner_text("body")
    context.close()


def test_a_page_of_somewhere_else_may_lead_here(browser: Any, address: str, tmp_path: Path) -> None:
    """As `--open` does: the cookie is not sent along a redirect that another page has begun."""
    link = tmp_path / "open.html"
    link.write_text(f'<!doctype html><meta http-equiv="refresh" content="0; url={address}">')
    context = browser.new_context()
    page = context.new_page()
    page.goto(link.as_uri())
    page.wait_for_selector("#gallery .group", timeout=WAIT_MS)
    assert "token" not in page.url
    context.close()


def test_a_page_that_loses_its_server_says_so(browser: Any, run: RunDirectory) -> None:
    with page_process(str(run.root)) as (process, told):
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(told["address"])
        page.wait_for_selector("[data-charts=reward] canvas")
        process.terminate()
        page.wait_for_function(
            "() => document.querySelector('#connection').textContent.startsWith('Connection lost')"
        )
        context.close()
