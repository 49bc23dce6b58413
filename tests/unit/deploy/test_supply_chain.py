"""`make sbom`, `make audit`: what is installed is listed whole; nothing is called audited that was not."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from services.config_file import PROJECT_ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

VENV = Path(sys.prefix)
KNOWN_BAD = "pycrypto"


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As a user calls it, with what is installed here."""
    assert (VENV / "audit").is_dir(), f"make VENV={VENV} {VENV}/.installed-audit"
    installed = [part for name in ("", "-audit") for part in ("--old-file", f"{VENV}/.installed{name}")]
    return subprocess.run(
        ["make", "--silent", *installed, f"VENV={VENV}", *arguments],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_the_sbom_lists_every_declared_dependency_as_it_is_installed(tmp_path: Path) -> None:
    file = tmp_path / "sbom.json"
    made = make("sbom", f"SBOM={file}")
    assert made.returncode == 0, made.stderr
    sbom = json.loads(file.read_text())
    assert sbom["bomFormat"] == "CycloneDX"
    listed = {canonicalize_name(one["name"]): one["version"] for one in sbom["components"]}
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        name = canonicalize_name(requirement.name)
        assert listed.get(name) == version(name), name
    assert "pip-audit" not in listed, "the tools are none of what runs"
    about = {one["ref"]: one.get("dependsOn", []) for one in sbom["dependencies"]}
    assert len(about["root-component"]) >= len(project["dependencies"])


class Database(BaseHTTPRequestHandler):
    """Answers as OSV does, from `known`: package -> advisory."""

    known: dict[str, str]

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
        package = {"name": asked, "ecosystem": "PyPI"}
        ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.1"}]}]
        advisory = {"id": self.known.get(asked), "affected": [{"package": package, "ranges": ranges}]}
        body = json.dumps({"vulns": [advisory]} if asked in self.known else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def database(**known: str) -> Iterator[str]:
    handler = type("Known", (Database,), {"known": known})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()


def audit(address: str) -> subprocess.CompletedProcess[str]:
    return make("audit", f"ADVISORIES={address}")


def test_what_the_database_knows_nothing_against_is_audited() -> None:
    with database(**{KNOWN_BAD: "OLD-1"}) as address:
        done = audit(address)
    assert done.returncode == 0, done.stderr
    pins = [line for line in (PROJECT_ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    assert f"audited {len(pins)} pins: no known advisories" in done.stdout


def test_an_advisory_fails_and_is_named_with_what_mends_it() -> None:
    with database(**{KNOWN_BAD: "OLD-1", "pillow": "NEW-7"}) as address:
        done = audit(address)
    assert done.returncode != 0
    assert "pillow: NEW-7, mended in 99.1: " in done.stdout and "1 known advisories" in done.stdout
    assert "OLD-1" not in done.stdout and "NOT AUDITED" not in done.stderr


@pytest.mark.parametrize("there", [True, False])
def test_what_was_not_audited_is_never_called_so(there: bool) -> None:
    """A database that is not there, and one that knows nothing: an empty mirror."""
    with database() as address:
        if there:
            done = audit(address)
    if not there:
        done = audit(address)
    assert done.returncode != 0
    says = "knows no advisory against pycrypto" if there else "gave no answer; pip-audit says: "
    assert f"NOT AUDITED: {address} {says}" in done.stderr
    assert "audited" not in done.stdout
