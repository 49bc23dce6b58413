"""Peak memory of each process of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import psutil

from services.heartbeat import peak_rss_bytes
from services.messages import Heartbeat

_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)


def peak_memory(beats: Iterable[Heartbeat]) -> dict[str, int]:
    """Peak resident bytes by part.

    Parts with a heartbeat are reported wherever they run; of the driver's own machine also the processes
    without one (queue server, reward servers, Ray itself), found among the driver's descendants.
    """
    parts = {beat.part: beat.rss_bytes for beat in beats}
    known = {beat.pid for beat in beats}
    parts["driver"] = peak_rss_bytes()
    for process in psutil.Process().children(recursive=True):
        try:
            name, peak = _name(process), _peak_bytes(process.pid)
        except (psutil.Error, OSError):
            continue  # it has ended meanwhile
        if process.pid not in known and peak is not None and name is not None:
            parts[name] = max(parts.get(name, 0), peak)
    return dict(sorted(parts.items()))


def _name(process: psutil.Process) -> str | None:
    title = " ".join(process.cmdline()) or process.name()
    if title.startswith("ray::"):
        title = title.removeprefix("ray::").split("(")[0].split(".")[0].strip()
        return None if title == "IDLE" else f"ray {title}"
    known = {
        "valkey-server": "queue server",
        "raylet": "raylet",
        "gcs_server": "ray gcs",
        "dashboard": "ray dashboard",
        "log_monitor": "ray log monitor",
        "runtime_env": "ray runtime-env agent",
    }
    return next((label for word, label in known.items() if word in title), None)


def _peak_bytes(pid: int) -> int | None:
    found = _PEAK.search(Path(f"/proc/{pid}/status").read_text())
    return int(found.group(1)) * 1024 if found else None
