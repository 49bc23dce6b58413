"""Whether a Ray cluster takes this client: what its servers ask for, and what a client of Ray would send.

Ray decides by RAY_AUTH_MODE on both sides, and not alike (2.60): `ray start --head` without the variable asks
for tokens where it finds one (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token); a client without it
sends none, whatever it finds. `ray.init` then tries for 20 s and says only that it could not connect.

Promises
- A token is sent to the cluster that is asked, and to nobody else; it is in no text and no repr.
- Starts no Ray and joins none: two requests, each with a deadline.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import httpx

from services.config import Config
from services.config_file import ConfigError
from services.ray_runtime import cluster_address
from services.spoken import OWN_PORT, spoken

ASK_S: Final = 5.0
GCS_PORT: Final = 6379
_ALIVE: Final = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_KUBERNETES: Final = Path("/var/run/secrets/ray.io/serviceaccount/token")
START_REMEDY: Final = "start the cluster (ray start --head), or mend cluster.address / RAY_ADDRESS"
GIVE_TOKEN: Final = (
    "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN=..., the one that the cluster's nodes were started with"
)
_NEW_TOKEN: Final = (
    "ray get-auth-token --generate, and the same token and RAY_AUTH_MODE=token on every node before ray start"
)


@dataclass(frozen=True)
class ClientToken:
    """What a client of Ray would send from here."""

    mode: str | None
    """RAY_AUTH_MODE; None where it is not set, which is `disabled` for a client."""
    token: str | None = field(repr=False)
    """None: there is none, wherever Ray looks."""
    source: str = ""
    """Where the token is from."""

    @property
    def sent(self) -> bool:
        return self.mode == "token" and self.token is not None


@dataclass(frozen=True)
class Access:
    """What a server says."""

    verdict: Literal["taken", "open", "reachable", "refused", "unreachable"]
    """`taken`: it asks for a token and takes this one; `open`: it asks for none; `reachable`: it does not
    tell."""
    found: str
    remedy: str = ""

    @property
    def ok(self) -> bool:
        return self.verdict in ("taken", "open", "reachable")


def client_token() -> ClientToken:
    """As Ray looks for it."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower() or None
    if said := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return ClientToken(mode, said, "RAY_AUTH_TOKEN")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    in_kubernetes = os.environ.get("RAY_ENABLE_K8S_TOKEN_AUTH", "").lower() in ("1", "true")
    file = Path(named) if named else _KUBERNETES if in_kubernetes else Path.home() / ".ray" / "auth_token"
    try:
        said = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        said = ""
    return ClientToken(mode, said or None, str(file))


def gcs_access(address: str, client: ClientToken) -> Access:
    """Asks the GCS at host:port, which is what a run joins."""
    host, port = _split(address)
    at = f"{host}:{port}"
    what = spoken(host, port, ASK_S)
    if what == "redis":
        found = f"{at}: a Redis or Valkey answers there, not Ray: `ray start --head` cannot have that port"
        return Access("unreachable", found, f"{OWN_PORT}, then ray start --head")
    if what == "http":
        found = f"{at}: a web server answers there, perhaps Ray's dashboard; a run joins Ray's GCS"
        return Access(
            "unreachable", found, f"give the GCS, HOST:{GCS_PORT}; a dashboard's address begins with http://"
        )
    if what is None and os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return Access("reachable", f"{at}: asked without TLS it says nothing, and RAY_USE_TLS is set")
    if what is None:
        return Access("unreachable", f"{at}: no Ray answers there", START_REMEDY)
    first = _ask_gcs(at, None)
    takes = _ask_gcs(at, client.token) if first == "asks" and client.token else None
    if first == "asks" and client.token and takes is None:
        first = None  # too busy to say
    return _access(f"Ray's GCS at {at}", first, None if takes is None else takes == "answers", client)


def dashboard_access(url: str, client: ClientToken) -> Access:
    """Asks the dashboard, which is what `ray job submit` talks to."""
    try:
        with httpx.Client(base_url=url, timeout=ASK_S, trust_env=False) as http:
            answer = http.get("/api/authentication_mode")
            told = answer.json().get("authentication_mode") if answer.status_code == 200 else None
            takes = None
            if told == "token" and client.token:
                head = {"Authorization": f"Bearer {client.token}"}
                takes = http.get("/api/version", headers=head).status_code == 200
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, AttributeError) as error:
        remedy = (
            "start the cluster (ray start --head), open the tunnel (ssh -L 8265:127.0.0.1:8265 HEAD, "
            "kubectl port-forward), or mend RAY_ADDRESS / RAY_API_SERVER_ADDRESS"
        )
        return Access("unreachable", f"no Ray dashboard answers at {url}: {type(error).__name__}", remedy)
    asks: dict[str | None, Literal["asks", "answers"]] = {"token": "asks", "disabled": "answers"}
    return _access(f"Ray's dashboard at {url}", asks.get(told), takes, client)


def refuse_without_access(config: Config) -> None:
    """Where the run would join a cluster that does not take this client, or is none: told now, in words.

    Raises:
        ConfigError: what it is, and what to do.
    """
    address = cluster_address(config)
    if address is None or address == "auto" or "//" in address:
        return
    access = gcs_access(address, client_token())
    if access.verdict == "refused" or (not access.ok and access.remedy != START_REMEDY):
        raise ConfigError(f"{access.found}; {access.remedy}")


def _access(
    server: str, asks: Literal["asks", "answers"] | None, takes: bool | None, client: ClientToken
) -> Access:
    if asks is None:
        return Access("reachable", f"{server} is reachable, and does not tell whether it wants a token")
    if asks == "answers":
        if client.mode == "token" and client.token is None:
            found = (
                f"{server} asks for no token; RAY_AUTH_MODE is token here, and Ray's clients refuse to start "
                "without one"
            )
            return Access("refused", found, f"better: {_NEW_TOKEN}; else export RAY_AUTH_MODE=disabled here")
        found = f"{server} asks for no token: whoever reaches it runs code on the cluster"
        return Access("open", found, _NEW_TOKEN)
    if client.token is None:
        found = f"{server} asks for a token, and there is none here (RAY_AUTH_TOKEN, {client.source})"
        return Access("refused", found, GIVE_TOKEN)
    if not takes:
        return Access("refused", f"{server} refuses the token of {client.source}", GIVE_TOKEN)
    if not client.sent:
        mode = f"is {client.mode}" if client.mode else "is not set"
        found = (
            f"{server} asks for a token, and Ray's clients send none from here, since RAY_AUTH_MODE {mode}: "
            "a `ray start --head` turns tokens on by itself where it finds one, a client does not"
        )
        return Access(
            "refused", found, f"export RAY_AUTH_MODE=token; the token of {client.source} is the right one"
        )
    return Access("taken", f"{server} takes the token of {client.source}")


def _ask_gcs(at: str, token: str | None) -> Literal["asks", "answers"] | None:
    """Whether it answers a question that is for members; None: it does not say."""
    import grpc

    metadata = [("authorization", f"Bearer {token}")] if token else []
    # A proxy of the environment has no business between nodes of a cluster.
    with grpc.insecure_channel(at, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary(_ALIVE)
        try:
            ask(b"", timeout=ASK_S, metadata=metadata)
        except grpc.RpcError as error:
            return "asks" if error.code() == grpc.StatusCode.UNAUTHENTICATED else None
    return "answers"


def _split(address: str) -> tuple[str, int]:
    """Host and port; Ray takes HOST:PORT, and IPv6 in brackets.

    >>> _split("head:6379"), _split("[::1]:7000"), _split("head")
    (('head', 6379), ('::1', 7000), ('head', 6379))
    """
    parts = httpx.URL(f"tcp://{address}")
    return parts.host, parts.port or GCS_PORT
