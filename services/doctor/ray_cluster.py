"""What `dgpo doctor` says of Ray: is the cluster there, does it take this client, is its port its own."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from services.config import Config
from services.demands import reserved
from services.doctor.finding import Finding
from services.ray_access import (
    GCS_PORT,
    START_REMEDY,
    Access,
    ClientToken,
    client_token,
    dashboard_access,
    gcs_access,
)
from services.ray_runtime import cluster_address, loopback_parts
from services.spoken import OWN_PORT

WORKER_PORTS: Final = range(10_002, 20_000)
"""What Ray gives to its workers."""
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")


def ray_findings(config: Config) -> list[Finding]:
    """The cluster that a run would join, the dashboard that a job is submitted to, and the queue's port."""
    address, client = cluster_address(config), client_token()
    submit = os.environ.get("RAY_API_SERVER_ADDRESS") or None
    found = []
    if address is None:
        cpus = reserved(config, "num_cpus")
        told = f"started by the run on loopback, with {cpus:.2f} CPUs reserved"
        found.append(Finding(what="ray", ok=True, found=told))
    elif _is_url(address):
        submit = submit or address
        if config.cluster.address is not None:
            found.append(_no_gcs(address))
    else:
        found.append(_cluster(config, address, client))
    if submit is not None and _is_url(submit):
        found.append(_finding("ray jobs", dashboard_access(submit, client)))
    return [*found, *_ports(config, address)]


def _cluster(config: Config, address: str, client: ClientToken) -> Finding:
    local = loopback_parts(config)
    beside = f"; on more than one node the run refuses to start with {', '.join(local)}" if local else ""
    if address.startswith("ray://"):
        return _no_gcs(address)
    if address == "auto":
        there = local_gcs()
        if there is None:
            return Finding(
                what="ray", ok=False, found="auto: no Ray runs on this machine", remedy=START_REMEDY
            )
        address = there
    return _finding("ray", gcs_access(address, client), beside)


def _no_gcs(address: str) -> Finding:
    remedy = f"set cluster.address to HOST:{GCS_PORT} or auto; RAY_ADDRESS may name the dashboard, for jobs"
    return Finding(what="ray", ok=False, found=f"{address}: a run joins Ray's GCS, not that", remedy=remedy)


def _finding(what: str, access: Access, beside: str = "") -> Finding:
    return Finding(
        what=what,
        ok=access.ok,
        warning=access.verdict == "open",
        found=access.found + (beside if access.ok else ""),
        remedy=access.remedy,
    )


def local_gcs() -> str | None:
    """Of the cluster that was started on this machine last, as Ray notes it for `auto`."""
    file = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _ports(config: Config, address: str | None) -> list[Finding]:
    """A queue on a port that Ray takes for itself, on a machine that Ray may be started on."""
    if config.queue.url is None or (parts := urlsplit(config.queue.url)).scheme == "unix":
        return []
    host, port = parts.hostname or "localhost", parts.port or GCS_PORT
    whose = "Ray's GCS" if port == GCS_PORT else "Ray's workers" if port in WORKER_PORTS else ""
    heads = {*_LOOPBACK, socket.gethostname()}
    if address is not None and address != "auto":
        heads.add(urlsplit(address if "//" in address else f"//{address}").hostname or "")
    if not whose or host not in heads:
        return []
    found = f"the queue is on {host}:{port}, which is {whose} by default: a `ray start` there does not get it"
    return [Finding(what="ports", ok=True, warning=True, found=found, remedy=OWN_PORT)]


def _is_url(address: str) -> bool:
    return address.startswith(("http://", "https://"))
