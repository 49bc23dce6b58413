"""Advisories that are known against the pinned dependencies: `make audit`, by pip-audit and the OSV database.

Promises
- "Audited" is said only where the database has answered for every pin, and for a package that certainly has
  advisories (`KNOWN_BAD`): a mirror that knows none would find none. Otherwise it is "NOT AUDITED", with the
  reason, and the exit code 2.
- Exit code 1: advisories, each with the versions that mend it. 0: audited, and none is known.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

KNOWN_BAD = "pycrypto==2.6.1"
"""Given up in 2013, with advisories that will stay; never a dependency."""
DEADLINE_S = 600
CLEAN, ADVISORIES, NOT_AUDITED = 0, 1, 2


class NotAudited(Exception):
    """Nothing is known of some dependency."""


def main(arguments: list[str]) -> int:
    """Audit the pins in a file of constraints against the database at an address."""
    if len(arguments) != 2:
        sys.stderr.write("usage: audit.py CONSTRAINTS DATABASE_URL\n")
        return NOT_AUDITED
    pins = pinned(Path(arguments[0]))
    try:
        found = asked(pins, arguments[1])
    except NotAudited as error:
        sys.stderr.write(f"NOT AUDITED: {error}\n")
        return NOT_AUDITED
    for line in found:
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(f"audited {len(pins)} pins: {len(found) or 'no'} known advisories\n")
    return ADVISORIES if found else CLEAN


def pinned(constraints: Path) -> list[str]:
    """`name==version` of every line."""
    lines = (line.partition("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def asked(pins: list[str], database: str) -> list[str]:
    """A line an advisory.

    Raises:
        NotAudited: the database did not answer for all, or knows nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text("\n".join([*pins, KNOWN_BAD]) + "\n", encoding="utf-8")
        answer = _pip_audit(wanted, database)
    bad = KNOWN_BAD.partition("==")[0]
    skipped = {item["name"]: item["skip_reason"] for item in answer if "skip_reason" in item}
    if skipped:
        raise NotAudited(f"{database} was not asked about {skipped}")
    if len(answer) != len(pins) + 1:
        raise NotAudited(
            f"{database} answered for {len(answer)} packages, and {len(pins) + 1} were asked about"
        )
    by_name = {item["name"]: item["vulns"] for item in answer}
    if not by_name.pop(bad):
        raise NotAudited(
            f"{database} knows no advisory against {KNOWN_BAD}, which has some: it knows none at all"
        )
    return [
        f"{name}: {one['id']}, mended in {', '.join(one['fix_versions']) or 'nothing'}: {one['description']}"
        for name, advisories in sorted(by_name.items())
        for one in advisories
    ]


def _pip_audit(requirements: Path, database: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--no-deps"]
    command += ["--disable-pip", "--vulnerability-service", "osv", "--osv-url", database]
    command += ["--format", "json", "--aliases", "on", "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        raise NotAudited(f"{database} had not answered for all within {DEADLINE_S} s") from None
    except (ValueError, KeyError):
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise NotAudited(f"{database} gave no answer; pip-audit says: {said[-1]}") from None
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
