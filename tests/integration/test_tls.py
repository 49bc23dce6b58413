"""TLS with an authority of one's own: a queue behind a proxy, a reward server by itself; who is refused.

The Valkey of the tests is built without TLS, so that a proxy takes it off, as stunnel does for others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import redis
import trustme
from queue_support import Run
from small_runs import TOKEN_VARIABLE, run
from tls_proxy import TlsProxy, certificate, written

from reward_servers.app import create_app
from reward_servers.client import RewardClient, RewardUntrusted, Scored
from reward_servers.local import LocalServer
from reward_servers.server_config import ServerConfig
from reward_servers.tls import read_authority
from services.config import Config
from services.config_file import load_config
from services.context import RewardPlace, RunContext, SecretPlace, queue_authority, reward_authority
from services.doctor.servers import queue_findings, reward_findings
from services.embedded import EmbeddedValkey
from services.queue_connection import QueueUnreachable, connect
from services.telemetry import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

PASSWORD_VARIABLE = "DGPO_TEST_QUEUE_PASSWORD"
NEVER_S = 3600.0
"""What was retried to its deadline would outlast the test."""


@dataclass(frozen=True)
class Authority:
    """One that signs, and the file that names it."""

    signs: trustme.CA
    file: Path

    @property
    def text(self) -> str:
        return read_authority(self.file)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    signs = trustme.CA()
    return Authority(signs, written(signs, tmp_path_factory.mktemp("ours")))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    signs = trustme.CA()
    return Authority(signs, written(signs, tmp_path_factory.mktemp("others")))


@pytest.fixture
def proxy(valkey: EmbeddedValkey, ours: Authority, tmp_path: Path) -> Iterator[TlsProxy]:
    """For 127.0.0.1, and not for localhost."""
    with TlsProxy(valkey.port, certificate(ours.signs, tmp_path, "127.0.0.1")) as opened:
        yield opened


@pytest.fixture(scope="module")
def served(ours: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A reward server over https, for 127.0.0.1 and not for localhost."""
    shown = certificate(ours.signs, tmp_path_factory.mktemp("served"), "127.0.0.1")
    with LocalServer(create_app(ServerConfig(app="jpeg", token_env=TOKEN_VARIABLE)), certificate=shown) as it:
        yield it.url


def queue_settings(proxy: TlsProxy, authority: Authority) -> list[str]:
    return [
        f"queue.url=rediss://127.0.0.1:{proxy.port}/0",
        f"queue.password_env={PASSWORD_VARIABLE}",
        f"queue.tls_ca={authority.file}",
        "queue.max_staleness=0",
    ]


def reward_setting(url: str, authority: Authority) -> str:
    return f"rewards=[{{name: size, url: '{url}', token_env: {TOKEN_VARIABLE}, tls_ca: '{authority.file}'}}]"


def test_groups_travel_over_tls_between_processes_that_have_no_file(
    valkey: EmbeddedValkey,
    proxy: TlsProxy,
    ours: Authority,
    run_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, valkey.password)
    there_only = Authority(ours.signs, written(ours.signs, tmp_path))
    config = load_config("quickstart", queue_settings(proxy, there_only))
    told = RunContext(
        run=run_name,
        directory=tmp_path,
        config=config,
        queue_url=str(config.queue.url),
        queue_password=SecretPlace(env=PASSWORD_VARIABLE),
        queue_authority=queue_authority(config),
    ).model_dump_json()
    there_only.file.unlink()
    context = RunContext.model_validate_json(told)
    run = Run(valkey, run_name)
    run.learner, run.worker = context.open_queue("learner"), context.open_queue("worker")
    run.begin()
    assert run.fill() == [0, 1]
    assert run.step() == [0, 1]
    assert run.learner.status().trained == 2
    assert proxy.handshakes >= 2, "it went through the proxy"


@pytest.mark.parametrize(
    ("host", "trusted", "says"),
    [
        ("127.0.0.1", "others", r"signed by nobody who is trusted here .*PEM file .* in queue\.tls_ca"),
        ("127.0.0.1", None, r"signed by nobody who is trusted here .*system's authorities are trusted"),
        ("localhost", "ours", r"for another name \(.*'localhost'\): use one that is in it"),
    ],
)
def test_a_queue_that_proves_nothing_is_refused_at_once(
    proxy: TlsProxy, request: pytest.FixtureRequest, host: str, trusted: str | None, says: str
) -> None:
    authority = None if trusted is None else request.getfixturevalue(trusted).text
    with pytest.raises(QueueUnreachable, match=rf"{host}:{proxy.port} is not used: .*{says}"):
        connect(f"rediss://{host}:{proxy.port}/0", "secret", authority=authority, deadline_s=NEVER_S)
    assert proxy.handshakes == 1


def test_a_certificate_that_has_expired_is_refused_at_once(
    proxy: TlsProxy, ours: Authority, tmp_path: Path
) -> None:
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    proxy.show(certificate(ours.signs, tmp_path, "127.0.0.1", until=long_ago))
    with pytest.raises(QueueUnreachable, match=r"proves nothing \(certificate has expired\)"):
        connect(f"rediss://127.0.0.1:{proxy.port}/0", "secret", authority=ours.text, deadline_s=NEVER_S)
    assert proxy.handshakes == 1


def test_a_queue_that_speaks_tls_is_told_from_one_that_is_not_there(proxy: TlsProxy) -> None:
    with pytest.raises(QueueUnreachable, match="it speaks TLS: the address must begin with rediss://"):
        connect(f"redis://127.0.0.1:{proxy.port}/0", "secret", deadline_s=NEVER_S)


def test_a_queue_that_speaks_no_tls_is_told_from_one_that_is_not_there(
    valkey: EmbeddedValkey, ours: Authority
) -> None:
    """A Valkey says nothing to a handshake: it is waited for to its deadline."""
    with pytest.raises(QueueUnreachable, match=r"it speaks no TLS: .* begins with redis://"):
        connect(valkey.url.replace("redis", "rediss"), valkey.password, authority=ours.text, deadline_s=0.5)


def test_a_certificate_that_is_changed_for_a_wrong_one_ends_a_command_at_once(
    valkey: EmbeddedValkey, proxy: TlsProxy, ours: Authority, others: Authority, tmp_path: Path
) -> None:
    url = f"rediss://127.0.0.1:{proxy.port}/0"
    client = connect(url, valkey.password, authority=ours.text)
    proxy.cut()
    assert client.ping(), "a lost connection is made anew"
    before = proxy.handshakes
    proxy.show(certificate(others.signs, tmp_path, "127.0.0.1"))
    proxy.cut()
    with pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
        client.ping()
    assert proxy.handshakes == before + 1


def test_an_address_may_name_a_certificate_of_the_client_and_no_option_that_weakens_tls(
    valkey: EmbeddedValkey, ours: Authority, tmp_path: Path
) -> None:
    shown = certificate(ours.signs, tmp_path, "127.0.0.1")
    with TlsProxy(valkey.port, shown, clients=ours.signs) as strict:
        url = f"rediss://127.0.0.1:{strict.port}/0"
        asked = f"{url}?ssl_certfile={shown.chain}&ssl_keyfile={shown.key}"
        assert connect(asked, valkey.password, authority=ours.text).ping()
        with pytest.raises(QueueUnreachable):
            connect(url, valkey.password, authority=ours.text, deadline_s=0.2)
        for option in ("ssl_cert_reqs=none", "ssl_check_hostname=false", "ssl_ca_certs=/x", "ssl_ciphers="):
            with pytest.raises(QueueUnreachable, match=f"{option.partition('=')[0]} is no option of an addr"):
                connect(f"{url}?{option}", valkey.password)


def score(client: RewardClient, how: str) -> Scored:
    """Through either face."""
    images = np.zeros((2, 16, 16, 3), np.uint8)
    if how == "sync":
        try:
            return client.score(images, "p")
        finally:
            client.close()

    async def ask() -> Scored:
        try:
            return await client.score_async(images, "p")
        finally:
            await client.aclose()

    return asyncio.run(ask())


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_reward_server_scores_over_https(served: str, ours: Authority, tmp_path: Path, how: str) -> None:
    there_only = Authority(ours.signs, written(ours.signs, tmp_path))
    (reward,) = load_config("quickstart", [reward_setting(served, there_only)]).rewards
    told = RewardPlace(
        url=str(reward.url), token=SecretPlace(env=TOKEN_VARIABLE), authority=reward_authority(reward)
    ).model_dump_json()
    there_only.file.unlink()
    client = RewardPlace.model_validate_json(told).client("size", NEVER_S)
    assert client.info() is not None
    scored = score(client, how)
    assert (len(scored.scores), scored.attempts) == (2, 1)


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize(
    ("host", "trusted", "says"),
    [
        ("127.0.0.1", "others", r"signed by nobody who is trusted here .*rewards\[\]\.tls_ca or --tls-ca"),
        ("127.0.0.1", None, r"signed by nobody who is trusted here .*system's authorities are trusted"),
        ("localhost", "ours", r"for another name \(.*'localhost'\)"),
    ],
)
def test_a_reward_server_that_proves_nothing_is_refused_at_once(
    served: str, request: pytest.FixtureRequest, host: str, trusted: str | None, says: str, how: str
) -> None:
    url = served.replace("127.0.0.1", host)
    authority = None if trusted is None else request.getfixturevalue(trusted).text
    place = RewardPlace(url=url, token=SecretPlace(env=TOKEN_VARIABLE), authority=authority)
    with pytest.raises(RewardUntrusted, match=rf"reward 'size' at {url}: .*{says}"):
        score(place.client("size", NEVER_S), how)
    client = place.client("size")
    for asks in (client.info, client.unreachable):
        with pytest.raises(RewardUntrusted, match=says):
            asks()
    client.close()


def test_a_reward_server_that_speaks_no_tls_is_refused_at_once(ocr_url: str, ours: Authority) -> None:
    url = ocr_url.replace("http://", "https://")
    with pytest.raises(RewardUntrusted, match="what answers there speaks no TLS"):
        score(RewardClient("ocr", url, "a-token-for-tests-only", NEVER_S, authority=ours.text), "sync")


def test_the_doctor_names_what_tls_lacks(
    valkey: EmbeddedValkey,
    proxy: TlsProxy,
    served: str,
    ours: Authority,
    others: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, valkey.password)

    def found(authority: Authority) -> tuple[list[bool], str]:
        settings = [*queue_settings(proxy, authority), reward_setting(served, authority)]
        config = load_config("quickstart", settings)
        findings = [*queue_findings(config), *reward_findings(config)]
        return [one.ok for one in findings], "\n".join(f"{one.found} {one.remedy}" for one in findings)

    assert found(ours)[0] == [True, True]
    ok, said = found(others)
    assert ok == [False, False]
    assert said.count("signed by nobody who is trusted here") == 2
    ok, said = found(Authority(ours.signs, Path("/nowhere.pem")))
    assert ok == [False, False]
    assert "queue.tls_ca: /nowhere.pem: cannot be read" in said
    assert "rewards: tls_ca of 'size': /nowhere.pem: cannot be read" in said


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
@pytest.mark.timeout(600)
def test_every_process_of_a_run_reaches_queue_and_reward_over_tls(
    recipe: Callable[..., Config], ours: Authority, tmp_path: Path
) -> None:
    """On Ray, with nothing but the driver's word for the authority."""
    shown = certificate(ours.signs, tmp_path, "127.0.0.1")
    with (
        EmbeddedValkey(tmp_path / "queue") as server,
        LocalServer(create_app(ServerConfig(app="ocr", token_env=TOKEN_VARIABLE)), certificate=shown) as ocr,
        TlsProxy(server.port, shown) as proxy,
    ):
        # Ray's workers have the environment in which Ray was started, and so no variable with this password.
        connect(server.url, server.password).config_set("requirepass", "")
        overrides = [line for line in queue_settings(proxy, ours) if PASSWORD_VARIABLE not in line]
        reward = reward_setting(ocr.url, ours).replace("size", "ocr")
        outcome = run(recipe("learner.max_steps=1", *overrides, reward))
        metrics = read_metrics(outcome.run.root)
        assert [row.step for row in metrics.updates] == [1]
        assert {row.when for row in metrics.evals} == {"before", "after"}
        assert proxy.handshakes > 4, "driver, learner, worker and evaluator have clients of their own"
