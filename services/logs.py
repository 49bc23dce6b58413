"""Log records of every process of a run, structured, one line each.

Promises
- A record is one line, with the fields run, step, version, ordinal and worker where they are known.
- Records go to `logs/<part>.log` of the run directory; grave ones to standard error as well.
- Imports nothing but the standard library: any process may call it first thing.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

LOG_FIELDS = ("run", "step", "version", "ordinal", "worker")

OWN_PACKAGES = (
    "services",
    "policy",
    "rollout_workers",
    "reward_servers",
    "learner",
    "quickstart",
    "benchmarks",
)
"""Whose records below WARNING are kept; other libraries write a line a request or a step."""


def configure_logging(
    part: str,
    run_dir: Path | None = None,
    *,
    run: str | None = None,
    level: int = logging.INFO,
    stream_level: int | None = logging.WARNING,
) -> None:
    """Send this process's records to `logs/<part>.log` of the run directory, and the grave ones to stderr.

    Safe to call again (a restarted actor does): handlers of an earlier call are replaced.

    Args:
        part: rollout-0, learner-0, driver; it becomes the field `worker`.
        run_dir: null writes no file.
        stream_level: lowest level that also goes to standard error; null for none.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, "dgpo", False)]:
        root.removeHandler(handler)
        handler.close()
    fields = {"run": run, "worker": part}
    handlers: list[logging.Handler] = []
    if run_dir is not None:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(run_dir / "logs" / f"{part}.log", encoding="utf-8"))
        handlers[-1].setLevel(level)
    if stream_level is not None:
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[-1].setLevel(stream_level)
    for handler in handlers:
        handler.dgpo = True  # type: ignore[attr-defined]
        handler.setFormatter(LineFormatter(fields))
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in OWN_PACKAGES:
        logging.getLogger(name).setLevel(min((handler.level for handler in handlers), default=level))
    # Read by transformers when it is imported: missing optional packages are no news to whoever trains.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class LineFormatter(logging.Formatter):
    """`time level logger message key=value ...`, always one line: line breaks become a literal \\n."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s %(message)s")
        self.converter = time.gmtime
        self.default_time_format = "%Y-%m-%dT%H:%M:%S"
        self.default_msec_format = "%s.%03dZ"
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        given = {name: getattr(record, name) for name in LOG_FIELDS if hasattr(record, name)}
        fields = {**self._fields, **given}
        shown = "".join(f" {name}={fields[name]}" for name in LOG_FIELDS if fields.get(name) is not None)
        message, line_break, trace = super().format(record).partition("\n")
        return (message + shown + line_break + trace).replace("\r", "").replace("\n", "\\n")
