"""What `dgpo doctor` says of one thing."""

from __future__ import annotations

from pydantic import BaseModel


class Finding(BaseModel, frozen=True):
    """One thing that was looked at."""

    what: str
    ok: bool
    found: str
    remedy: str = ""
    warning: bool = False
    """The run can start, and something of it will not be as it is configured."""
