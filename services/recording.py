"""A recording: the groups of a run on disk, to be trained from without the workers that made them.

    DIR/index.jsonl                 line 1: Facts; then one RecordedGroup a line, in the order of training
       /shard-000000.safetensors    whole groups: tensors ORDINAL/latents, ORDINAL/condition.*, ...

Promises
- What a kill at any moment leaves is a recording: the groups up to that moment, each whole. A torn last line
  is no group; a shard that the index does not name is no part of it.
- A shard that is missing, cut short or changed is named when the recording is opened or its group is read:
  each group's sha256 is the one it would travel with (services/codec.py).
- Read in the order of its ordinals, which does not depend on how fast which worker was.
- Shards are plain safetensors files; nothing in a recording is pickled.

Written by services/recording_writer.py; what an offline run makes of it: services/offline.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from services.codec import CorruptGroup, Group, decode_group
from services.config import Config
from services.config_file import ConfigError
from services.messages import GroupHeader, Message
from services.safetensors_layout import pack

FORMATS = (1, 2)
"""Those that are read; the last is written. Format 1 says nothing of sigmas and terminal."""
INDEX = "index.jsonl"
SHARD_NAME = re.compile(r"shard-(\d{6,})\.safetensors")


class RecordingError(ConfigError):
    """The recording cannot be used; the text names the directory, the file or the line, and why."""


class Facts(Message):
    """How the groups were made: what an offline run must agree with, and what people want to know."""

    format: Literal[1, 2] = 2
    run: str
    """The run that recorded them; with the ordinal it names a group."""
    seed: int
    model: str
    height: int
    width: int
    prompts: str
    """The kind of source they came from."""
    group_size: int
    solver: str
    noise_level: float | None
    steps: int
    shift: float
    sigmas: str | None = None
    """`rollout.sigmas`; null in format 1, which does not say it."""
    terminal: float | None = None
    """`rollout.terminal`, where sigmas are told."""
    guidance: float
    rewards: tuple[str, ...]
    """Those that the run was configured with; a group may lack an optional or a held-out one."""
    latent_shape: tuple[int, ...]
    """Of one sample."""
    trajectory: bool
    """Whether the groups hold the trajectories and likelihoods that flow_grpo needs."""

    @classmethod
    def of(cls, config: Config, run: str, group: Group) -> Facts:
        """Of a run, and the first of its groups."""
        rollout, model = config.rollout, config.model
        if config.prompts.source == "recorded":
            raise ValueError("a run that trains from a recording samples nothing to record")
        return cls(
            run=run,
            seed=config.run.seed,
            model=model.path,
            height=model.height,
            width=model.width,
            prompts=config.prompts.source,
            group_size=rollout.group_size,
            solver=rollout.solver,
            noise_level=rollout.noise_level,
            steps=rollout.steps,
            shift=rollout.shift,
            sigmas=rollout.sigmas,
            terminal=rollout.terminal,
            guidance=rollout.guidance,
            rewards=tuple(reward.name for reward in config.rewards),
            latent_shape=tuple(group.tensors["latents"].shape[1:]),
            trajectory="trajectory" in group.tensors,
        )


class RecordedGroup(Message):
    """One line of the index."""

    ordinal: int
    shard: str
    shard_bytes: int
    """Size of the whole shard."""
    sha256: str
    """Over header and payload, as the group travels."""
    header: str
    """JSON of its GroupHeader, to the byte: the digest is over it."""


class Recording:
    """A recording, opened for reading."""

    def __init__(self, directory: Path, facts: Facts, groups: tuple[RecordedGroup, ...]) -> None:
        self.directory = directory
        self.facts = facts
        self.groups = groups

    @classmethod
    def open(cls, directory: Path) -> Recording:
        """Read the index and look whether its shards are there; the groups themselves are proven when read.

        Raises:
            RecordingError: no recording, one of another format, or one whose index or shards are damaged.
        """
        facts, groups = read_index(directory)
        if facts is None or not groups:
            raise RecordingError(
                f"{directory}: holds no group: was its recorder stopped before the first one?"
            )
        for name, size in {group.shard: group.shard_bytes for group in groups}.items():
            path = directory / name
            try:
                found = path.stat().st_size
            except OSError as error:
                raise RecordingError(f"{path}: the index names it, and it cannot be read: {error}") from error
            if found != size:
                raise RecordingError(f"{path}: {found} bytes, recorded as {size}: truncated or tampered with")
        return cls(directory, facts, tuple(sorted(groups, key=lambda group: group.ordinal)))

    def __len__(self) -> int:
        return len(self.groups)

    def header(self, place: int) -> GroupHeader:
        """Of the group at a place in the order of ordinals; proven only when the group is read."""
        group = self.groups[place]
        try:
            return GroupHeader.model_validate_json(group.header)
        except ValidationError as error:
            where = f"{self.directory / INDEX}: group {self.facts.run}-{group.ordinal}"
            raise RecordingError(f"{where}: header cannot be read: {error.errors()[0]['msg']}") from error

    def read(self, place: int) -> Group:
        """The group at a place, whole and proven.

        Raises:
            CorruptGroup: it is not what was recorded; shard and group are named.
        """
        recorded = self.groups[place]
        group_id, path = f"{self.facts.run}-{recorded.ordinal}", self.directory / recorded.shard
        prefix = f"{recorded.ordinal}/"
        try:
            with safe_open(path, framework="pt") as shard:
                names = [name for name in shard.keys() if name.startswith(prefix)]  # noqa: SIM118
                tensors = {name.removeprefix(prefix): shard.get_tensor(name) for name in names}
            return decode_group(recorded.header.encode(), pack(tensors), recorded.sha256, group_id=group_id)
        except CorruptGroup as error:
            raise CorruptGroup(group_id, f"{path}: {error.reason}") from error
        except (OSError, SafetensorError) as error:
            raise CorruptGroup(group_id, f"{path}: cannot be read: {error}") from error


def read_index(directory: Path) -> tuple[Facts | None, tuple[RecordedGroup, ...]]:
    """The index as far as it is whole; nothing where its first line was never finished.

    Raises:
        RecordingError: there is none, or a finished line is not what a recorder writes.
    """
    path = directory / INDEX
    try:
        # What follows the last line end was torn by a kill, or is nothing.
        first, *lines = path.read_bytes().split(b"\n")[:-1] or [b""]
    except OSError as error:
        missing = f"there is no {INDEX} in it" if directory.is_dir() else "there is no such directory"
        why = f"{missing}; make one with dgpo record"
        if not isinstance(error, FileNotFoundError):
            why = str(error)
        raise RecordingError(f"{directory}: not a recording: {why}") from error
    if not first:
        return None, ()
    facts, groups, seen = _facts(path, first), [], set[int]()
    for number, line in enumerate(lines, start=2):
        try:
            group = RecordedGroup.model_validate_json(line)
        except ValidationError as error:
            raise RecordingError(
                f"{path}, line {number}: not a recorded group: {error.errors()[0]['msg']}"
            ) from error
        if SHARD_NAME.fullmatch(group.shard) is None:
            raise RecordingError(f"{path}, line {number}: no shard can be named {group.shard!r}")
        if group.ordinal in seen:
            raise RecordingError(f"{path}, line {number}: ordinal {group.ordinal} is recorded twice")
        seen.add(group.ordinal)
        groups.append(group)
    return facts, tuple(groups)


def _facts(path: Path, line: bytes) -> Facts:
    try:
        found = json.loads(line)
        version = found["format"]
        if version not in FORMATS:
            valid = " and ".join(map(str, FORMATS))
            raise RecordingError(f"{path}: format {version!r}, this version reads formats {valid}")
        return Facts.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecordingError(f"{path}, line 1: {place}: {first['msg']}") from error
    except RecordingError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise RecordingError(
            f"{path}, line 1: says nothing of how the groups were made: {error!r}"
        ) from error
