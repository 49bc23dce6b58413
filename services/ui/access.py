"""Who may look: a token, a cookie, the names that the page answers to, and headers that bind the browser.

Promises
- Before anything else is done with a request, its Host must be a name of the page: a name that somebody else
  controls and points at loopback (DNS rebinding) gets nothing.
- Everything then asks for the token: in the address once, which sets a cookie and leaves the address, or as
  `Authorization: Bearer`. Compared in constant time; the cookie does not hold the token itself.
- Only GET and HEAD: nothing can be changed here.
- Every answer forbids inline script, other origins, framing and sniffing.
"""

from __future__ import annotations

import hashlib
import hmac
import html
import ipaddress
import socket
import time
from collections.abc import Iterable
from typing import Final
from urllib.parse import parse_qsl, quote, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.config_file import ConfigError
from services.context import SecretPlace

SHORTEST_TOKEN: Final = 16
LOOPBACK_NAMES: Final = frozenset({"127.0.0.1", "localhost", "::1"})
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_REFUSED = """<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>Token needed</title>
<h1>Token needed</h1>
<p>{}</p>
</html>
"""
_ENTERED = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={0}">
<title>Entering</title><a href="{0}">Go on</a></html>
"""
ABSENT: Final = "Open the address that <code>dgpo ui</code> has printed: it ends in the token."
WRONG: Final = (
    "This token is not the one of this page; a page that was started again has a new one. "
    "Open the address that <code>dgpo ui</code> has printed last."
)


class Access:
    """ASGI middleware around the whole application."""

    def __init__(
        self, app: ASGIApp, *, token: str, hosts: Iterable[str] = LOOPBACK_NAMES, any_address: bool = False
    ) -> None:
        """
        Args:
            hosts: names and addresses that the page answers to, on any port (a tunnel has its own).
            any_address: also to every IP address, which no name can be pointed at.
        """
        self._app = app
        self._token = token.encode()
        self._hosts = frozenset(host.lower() for host in hosts)
        self._any_address = any_address
        self._cookie = f"dgpo-ui-{self._derived('name')[:8]}"
        self._session = self._derived("session")

    def _derived(self, what: str) -> str:
        return hmac.new(self._token, f"dgpo ui {what}".encode(), hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"the run page speaks HTTP, not {scope['type']}")

        began = time.perf_counter()

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers["server-timing"] = f"app;dur={1000 * (time.perf_counter() - began):.2f}"
                headers.setdefault("cache-control", "no-store")
            await send(message)

        answer = self._refusal(scope)
        await (answer or self._app)(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to one who may not look, or has come with the token in the address; None: go on."""
        headers = Headers(scope=scope)
        if not self._is_ours(headers.get("host", "")):
            return PlainTextResponse("This page does not answer to that name.\n", status_code=421)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("Nothing can be changed here.\n", 405, {"allow": "GET, HEAD"})
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in query if name == "token"]
        if given:
            if not self._same(given[0], self._token):
                return HTMLResponse(_REFUSED.format(WRONG), status_code=401)
            return self._enter(scope, [(name, value) for name, value in query if name != "token"])
        bearer = headers.get("authorization", "")
        if bearer[:7].lower() == "bearer " and self._same(bearer[7:], self._token):
            return None
        if self._same(cookie_parser(headers.get("cookie", "")).get(self._cookie, ""), self._session.encode()):
            return None
        return HTMLResponse(_REFUSED.format(ABSENT), status_code=401)

    def _enter(self, scope: Scope, rest: list[tuple[str, str]]) -> Response:
        # One slash: an address that begins with two would lead to another host.
        path = "/" + quote(scope["path"].lstrip("/\\"))
        if path == scope.get("root_path"):
            path += "/"
        target = path + ("?" + urlencode(rest) if rest else "")
        answer: Response = RedirectResponse(target, status_code=303)
        if Headers(scope=scope).get("sec-fetch-site") == "cross-site":
            # A browser sends no such cookie along a redirect that another page has begun; from here it does.
            answer = HTMLResponse(_ENTERED.format(html.escape(target)))
        answer.set_cookie(
            self._cookie,
            self._session,
            httponly=True,
            samesite="strict",
            secure=scope.get("scheme") == "https",
            path=scope.get("root_path") or "/",
        )
        return answer

    def _is_ours(self, host: str) -> bool:
        name = host_name(host)
        if name in self._hosts:
            return True
        return self._any_address and _is_address(name)

    @staticmethod
    def _same(given: str, wanted: bytes) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), wanted)


def token_of(variable: str) -> str:
    """The token that an environment variable holds.

    Raises:
        ConfigError: it is not set, or too short to be one.
    """
    token = SecretPlace(env=variable).read() or ""
    if len(token) < SHORTEST_TOKEN:
        raise ConfigError(f"{variable} holds {len(token)} characters; a token has at least {SHORTEST_TOKEN}")
    return token


def host_name(host: str) -> str:
    """The name in a Host header, without its port.

    >>> host_name("[::1]:8000"), host_name("LocalHost:80"), host_name("localhost.")
    ('::1', 'localhost', 'localhost.')
    """
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_loopback(host: str) -> bool:
    """True where only this machine can reach it."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def names_of(host: str) -> frozenset[str]:
    """What the page answers to where it listens at `host`."""
    if is_loopback(host):
        return LOOPBACK_NAMES | {host}
    return LOOPBACK_NAMES | {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
