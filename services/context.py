"""What the driver tells every other process of a run: where things are, and where secrets may be read.

Promises
- Plain JSON; holds the places of secrets (a variable, a file), never a secret.
- Whoever has it can reach the queue, the reward servers and the run directory, and nothing else is needed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from services.config import Config, QueuePart
from services.config_file import ConfigError
from services.group_queue import GroupQueue, connect
from services.messages import Message
from services.run_directory import RunDirectory


class SecretPlace(Message):
    """Where a secret is read from: an environment variable or a file. Neither: there is none."""

    env: str | None = None
    file: Path | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.env is not None and self.file is not None:
            raise ValueError("a secret is in a variable or in a file, not in both")
        return self

    def read(self) -> str | None:
        """The secret itself.

        Raises:
            ConfigError: the variable is not set, or the file cannot be read.
        """
        if self.env is not None:
            value = os.environ.get(self.env, "").strip()
            if not value:
                raise ConfigError(f"the environment variable {self.env} is not set: it must hold a secret")
            if not (value.isascii() and value.isprintable()):
                raise ConfigError(f"the environment variable {self.env} holds more than printable ASCII")
            return value
        if self.file is None:
            return None
        try:
            return self.file.read_text().strip()
        except OSError as error:
            raise ConfigError(f"secret file {self.file}: cannot be read: {error}") from error


class RewardPlace(Message):
    """A running reward server."""

    url: str
    token: SecretPlace = SecretPlace()


class RunContext(Message):
    """A run, as every process of it sees it."""

    run: str
    """Name of the run directory; names the run in Redis keys and actors."""
    directory: Path
    config: Config
    queue_url: str
    queue_password: SecretPlace = SecretPlace()
    rewards: dict[str, RewardPlace] = Field(default_factory=dict)
    record: Path | None = None
    """`dgpo record`: the groups are written here, and nothing is trained."""

    @property
    def run_directory(self) -> RunDirectory:
        return RunDirectory(self.directory)

    def open_queue(self, part: QueuePart) -> GroupQueue:
        """A queue client of this process, with the login of its part.

        Raises:
            ConfigError: this part has no login, or the variable of its password is not set here.
            QueueUnreachable: nobody there, or the password is refused.
        """
        logins = self.config.queue.logins
        login = logins.get(part)
        if logins and login is None:
            raise ConfigError(f"queue.logins has no {part}: name its user and password_env there")
        if login is None:
            client = connect(self.queue_url, self.queue_password.read())
        else:
            password = SecretPlace(env=login.password_env).read()
            client = connect(self.queue_url, password, user=login.user or part)
        return GroupQueue(client, self.run, self.config.queue)
