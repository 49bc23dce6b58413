"""What `dgpo doctor` says of Ray without any. With a real one: tests/integration/test_ray_job.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services import ray_access
from services.config_file import load_config
from services.doctor.ray_cluster import ray_findings
from services.ray_access import client_token
from tests.ports import free_ports

TOKEN = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_token_is_looked_for_as_ray_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert client_token().token is None and client_token().mode is None
    home = tmp_path / ".ray" / "auth_token"
    home.parent.mkdir()
    home.write_text("at-home\n")
    assert (client_token().token, client_token().source) == ("at-home", str(home))
    named = tmp_path / "named"
    named.write_text("in-a-file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named))
    assert (client_token().token, client_token().source) == ("in-a-file", str(named))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gone"))
    assert client_token().token is None, "Ray does not look further either"
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_AUTH_MODE", "TOKEN")
    found = client_token()
    assert (found.token, found.source, found.mode) == (TOKEN, "RAY_AUTH_TOKEN", "token")
    assert TOKEN not in repr(found)


def test_nobody_there_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    gcs, dashboard = free_ports(2)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{dashboard}")
    cluster, jobs = ray_findings(load_config("quickstart", [f"cluster.address=127.0.0.1:{gcs}"]))
    assert not cluster.ok and cluster.found == f"127.0.0.1:{gcs}: no Ray answers there"
    assert "ray start --head" in cluster.remedy
    assert not jobs.ok and "no Ray dashboard answers at" in jobs.found
    assert "open the tunnel" in jobs.remedy


def test_a_gcs_that_cannot_be_asked_refuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that speaks TLS hears nothing of what is asked; one that is too busy has refused nothing."""
    (port,) = free_ports(1)
    config = load_config("quickstart", [f"cluster.address=127.0.0.1:{port}"])
    monkeypatch.setenv("RAY_USE_TLS", "1")
    (found, *_) = ray_findings(config)
    assert found.ok and "RAY_USE_TLS is set" in found.found
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr(ray_access, "spoken", lambda *place: "grpc")
    answers: list[str | None] = ["asks", None]
    monkeypatch.setattr(ray_access, "_ask_gcs", lambda at, token: answers.pop(0))
    (found, *_) = ray_findings(config)
    assert answers == [] and found.ok and "does not tell whether it wants a token" in found.found


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_a_run_does_not_join_a_dashboard(address: str) -> None:
    (found, *_) = ray_findings(load_config("quickstart", [f"cluster.address={address}"]))
    assert not found.ok and "a run joins Ray's GCS" in found.found


@pytest.mark.parametrize(
    ("url", "address", "whose"),
    [
        ("redis://127.0.0.1:6379/0", None, "Ray's GCS"),
        ("redis://localhost/0", None, "Ray's GCS"),
        ("redis://127.0.0.1:12345/0", None, "Ray's workers"),
        ("redis://127.0.0.1:6380/0", None, None),
        ("redis://other:6379/0", None, None),
        ("redis://head:6379/0", "ray://head:10001", "Ray's GCS"),
    ],
)
def test_a_queue_on_a_port_of_rays_is_a_warning(url: str, address: str | None, whose: str | None) -> None:
    settings = [f"queue.url={url}", *([f"cluster.address={address}"] if address else [])]
    found = [one for one in ray_findings(load_config("quickstart", settings)) if one.what == "ports"]
    assert len(found) == (whose is not None)
    if whose:
        assert found[0].warning and whose in found[0].found and "6380" in found[0].remedy
