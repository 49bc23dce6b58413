"""What one reward server is started with, whether by Ray Serve, by the driver or alone.

Promises
- The token is never among the arguments: only the environment variable or the file that holds it.
- A token file that others may read is refused, as is a token that could be guessed.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, model_validator

from reward_servers.protocol import Limits, ProtocolModel

MIN_TOKEN_CHARS: Final = 16
TOKEN_BYTES: Final = 32
"""Random bytes of a token that is made here."""


class ServerConfig(ProtocolModel):
    """The `args` of one reward application.

    >>> ServerConfig(app="ocr", token_env="REWARD_TOKEN").batching
    'request'
    """

    app: str
    """The scorer: a file of reward_servers/scorers, or `package.module:create` of another package."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that scorer."""
    token_env: str | None = None
    """Environment variable of the server that holds the bearer token."""
    token_file: Path | None = None
    """Or: a file that holds it, readable by its owner only."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of the scorer."""
    batching: Literal["request", "dynamic"] = "request"
    """`request`: a request is scored as a unit, unless merging cannot be seen in a score (batch-invariant
    scorers); `dynamic`: waiting requests are merged, up to the images that the scorer takes at once."""
    deadline_s: float = Field(default=60.0, gt=0)
    """Seconds for a request's body to arrive (then 408), and from there to its answer, waiting included (then
    504)."""
    max_pending: int = Field(default=16, ge=1)
    """Requests being read, waiting or being scored in a replica; more get 429."""
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _one_token(self) -> ServerConfig:
        if (self.token_env is None) == (self.token_file is None):
            raise ValueError(
                "give either token_env or token_file: a reward server without a token is not started"
            )
        return self

    def token(self) -> str:
        """The bearer token, read from where the configuration says."""
        if self.token_file is not None:
            return read_token(self.token_file)
        token = os.environ.get(self.token_env or "", "")
        return _checked(token, f"environment variable {self.token_env}")


def read_token(path: Path) -> str:
    """The token in a file that only its owner may read.

    Raises:
        ValueError: others may read it, or it holds no usable token.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ValueError(f"token file {path} has mode {mode:04o}: others may read it; chmod 600 {path}")
    return _checked(path.read_text(encoding="ascii").strip(), f"token file {path}")


def make_token_file(path: Path) -> bool:
    """Put a new random token into `path`, mode 0600, unless there is a file; whether there was none."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        # With O_EXCL a link that somebody left there is not followed.
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(file, "w", encoding="ascii") as opened:
        opened.write(secrets.token_urlsafe(TOKEN_BYTES) + "\n")
    return True


def _checked(token: str, place: str) -> str:
    if len(token) < MIN_TOKEN_CHARS or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"{place}: expected a token of at least {MIN_TOKEN_CHARS} printable ASCII characters"
        )
    return token
