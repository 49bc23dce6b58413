"""Who may see the run page: tokens, cookies, names, methods, headers."""

from __future__ import annotations

import re

import httpx
import pytest
from starlette.responses import PlainTextResponse

from services.ui.access import Access, is_loopback, names_of
from tests.unit.services.ui.made_runs import TOKEN


def _client(**options: object) -> httpx.AsyncClient:
    app = Access(PlainTextResponse("inside"), token=TOKEN, **options)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1:8200")


@pytest.fixture
def client() -> httpx.AsyncClient:
    return _client()


async def test_without_a_token_there_is_one_plain_sentence(client: httpx.AsyncClient) -> None:
    for path in ("/", "/api/run", "/api/stream", "/static/page.js", "/api/groups/0-0/0", "/nothing"):
        answer = await client.get(path)
        assert answer.status_code == 401
        assert "dgpo ui" in answer.text
        assert "inside" not in answer.text


async def test_the_token_sets_a_cookie_and_leaves_the_address(client: httpx.AsyncClient) -> None:
    answer = await client.get("/", params={"token": TOKEN, "x": "1 2"})
    assert answer.status_code == 303
    assert answer.headers["location"] == "/?x=1+2"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Path=/" in cookie
    assert TOKEN not in cookie
    assert (await client.get(answer.headers["location"])).text == "inside"


async def test_a_link_of_another_page_goes_on_from_here(client: httpx.AsyncClient) -> None:
    query = {"token": TOKEN, "x": '"><script>'}
    answer = await client.get("/", params=query, headers={"sec-fetch-site": "cross-site"})
    assert answer.status_code == 200
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert 'url=/?x=%22%3E%3Cscript%3E"' in answer.text
    assert TOKEN not in answer.text


async def test_programs_bring_it_in_a_header(client: httpx.AsyncClient) -> None:
    for given in (f"Bearer {TOKEN}", f"bearer {TOKEN}"):
        assert (await client.get("/", headers={"authorization": given})).text == "inside"


@pytest.mark.parametrize("wrong", ["", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "ä", "\x00"])
async def test_a_wrong_token_gets_nothing(client: httpx.AsyncClient, wrong: str) -> None:
    answer = await client.get("/", params={"token": wrong})
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    header = {"authorization": f"Bearer {wrong}".encode()}
    assert (await client.get("/", headers=header)).status_code == 401


async def test_the_cookie_of_another_page_gets_nothing(client: httpx.AsyncClient) -> None:
    entered = await client.get("/", params={"token": TOKEN})
    name = entered.headers["set-cookie"].partition("=")[0]
    other = Access(PlainTextResponse("inside"), token=TOKEN + "2")
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=other), base_url="http://127.0.0.1"
    ) as second:
        theirs = (await second.get("/", params={"token": TOKEN + "2"})).cookies
    assert name not in theirs
    client.cookies.clear()
    value = next(iter(theirs.values()))
    assert (await client.get("/", headers={"cookie": f"{name}={value}"})).status_code == 401
    assert (await client.get("/", headers={"cookie": f"{name}={TOKEN}"})).status_code == 401


async def test_cookies_of_others_on_this_machine_do_not_hide_ours(client: httpx.AsyncClient) -> None:
    entered = await client.get("/", params={"token": TOKEN})
    ours = entered.headers["set-cookie"].partition(";")[0]
    client.cookies.clear()
    answer = await client.get("/", headers={"cookie": f'settings={{"a b": [1,2]}}; {ours}; other=x'})
    assert answer.text == "inside"


@pytest.mark.parametrize("path", ["//evil.example", "/\\evil.example", "//evil.example/%2e%2e"])
async def test_the_redirect_never_leaves_the_page(path: str) -> None:
    app = Access(PlainTextResponse("inside"), token=TOKEN)
    sent = []

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "query_string": f"token={TOKEN}".encode(),
        "headers": [(b"host", b"localhost")],
    }
    await app(scope, None, send)  # type: ignore[arg-type]
    headers = dict(sent[0]["headers"])  # type: ignore[call-overload]
    assert re.match(rb"/[^/\\]", headers[b"location"])


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.1:9999", "[::1]:8200", "LOCALHOST:1"])
async def test_it_answers_to_loopback_on_any_port(client: httpx.AsyncClient, host: str) -> None:
    answer = await client.get("/", headers={"host": host, "authorization": f"Bearer {TOKEN}"})
    assert answer.text == "inside"


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8200", "", "10.0.0.7"]
)
async def test_it_answers_to_no_other_name_even_with_the_token(client: httpx.AsyncClient, host: str) -> None:
    for query in ({}, {"token": TOKEN}):
        answer = await client.get(
            "/", params=query, headers={"host": host, "authorization": f"Bearer {TOKEN}"}
        )
        assert answer.status_code == 421
        assert "set-cookie" not in answer.headers


async def test_beyond_loopback_it_answers_to_addresses_and_its_own_names() -> None:
    async with _client(hosts=names_of("node7.cluster"), any_address=True) as client:
        for host, status in (("node7.cluster:80", 200), ("10.0.0.7", 200), ("evil.example", 421)):
            answer = await client.get("/", headers={"host": host, "authorization": f"Bearer {TOKEN}"})
            assert answer.status_code == status, host


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_nothing_can_be_changed(client: httpx.AsyncClient, method: str) -> None:
    answer = await client.request(method, "/", headers={"authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 405


async def test_every_answer_binds_the_browser(client: httpx.AsyncClient) -> None:
    inside = await client.get("/", headers={"authorization": f"Bearer {TOKEN}"})
    refused = await client.get("/")
    misnamed = await client.get("/", headers={"host": "evil.example"})
    entered = await client.get("/", params={"token": TOKEN})
    for answer in (inside, refused, misnamed, entered):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"


def test_which_addresses_are_of_this_machine_alone() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.0.0.2", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.7", "node7", "")))
