"""What the driver tells every other process of a run: where things are, and where secrets may be read.

Promises
- Plain JSON; holds the places of secrets (a variable, a file), never a secret. Certificates of authorities
  are no secret: they are in it as text, so that no other node needs the file.
- Whoever has it can reach the queue, the reward servers and the run directory, and nothing else is needed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from reward_servers.client import RewardClient
from reward_servers.tls import read_authority
from services.config import Config, QueuePart, RewardConfig
from services.config_file import ConfigError
from services.group_queue import GroupQueue, connect
from services.messages import Message
from services.queue_connection import AUTHORITY
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


def authority(path: Path | None, key: str) -> str | None:
    """The certificates of a setting `tls_ca`, PEM; None where it is not set.

    Raises:
        ConfigError: the file is not there, or is none; `key` is named.
    """
    try:
        return None if path is None else read_authority(path)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def reward_authority(reward: RewardConfig) -> str | None:
    """`authority` of a reward."""
    return authority(reward.tls_ca, f"rewards: tls_ca of {reward.name!r}")


def queue_authority(config: Config) -> str | None:
    """`authority` of the queue."""
    return authority(config.queue.tls_ca, AUTHORITY)


class RewardPlace(Message):
    """A running reward server."""

    url: str
    token: SecretPlace = SecretPlace()
    authority: str | None = None
    """Certificates to trust beside the system's, PEM."""

    def client(self, name: str, deadline_s: float = 60.0, *, app: str | None = None) -> RewardClient:
        """A client of it, for one process.

        Raises:
            ConfigError: the token is not to be had here.
        """
        return RewardClient(name, self.url, self.token.read(), deadline_s, app=app, authority=self.authority)


class RunContext(Message):
    """A run, as every process of it sees it."""

    run: str
    """Name of the run directory; names the run in Redis keys and actors."""
    directory: Path
    config: Config
    queue_url: str
    queue_password: SecretPlace = SecretPlace()
    queue_authority: str | None = None
    """Certificates to trust beside the system's, PEM."""
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
            user, password = None, self.queue_password.read()
        else:
            user, password = login.user or part, SecretPlace(env=login.password_env).read()
        client = connect(self.queue_url, password, user=user, authority=self.queue_authority)
        return GroupQueue(client, self.run, self.config.queue)
