"""Writes a recording (services/recording.py) beside the training, so that a kill costs no recorded group.

Promises
- A shard has its name only when it is whole on the disk, and the index names it only after that.
- Opened again, it keeps what the surviving lineage has trained and drops the rest: no ordinal is in it twice.
- One writer at a time: the directory is locked, and the lock dies with its holder.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from services.codec import Group, encode_group
from services.config import Config
from services.full_disk import naming
from services.pieces import in_pieces
from services.queue_types import Frontier
from services.recording import INDEX, SHARD_NAME, Facts, RecordedGroup, RecordingError, read_index
from services.safetensors_layout import pack

SHARD_BYTES = 256 * 1024**2
"""A shard holds the groups of one update, or fewer where they are more than this; never less than one."""


class RecordingWriter:
    """Appends groups to a recording; use as a context manager.

    Args:
        directory: made where there is none.
        config: of the run.
        run: its name.
        frontier: what is trained according to the checkpoint that the learner starts from.

    Raises:
        RecordingError: another process writes it, or what is there is damaged.
    """

    def __init__(self, directory: Path, config: Config, run: str, frontier: Frontier | None = None) -> None:
        self._directory, self._config, self._run = directory, config, run
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(directory, os.O_RDONLY)
        try:
            self._hold()
            facts, groups = read_index(directory) if (directory / INDEX).exists() else (None, ())
            frontier = frontier or Frontier()
            kept = [g for g in groups if frontier.resolved(g.ordinal) and g.ordinal not in frontier.dead]
            self._facts = facts if kept else None
            self._rewrite(kept)
        except BaseException:
            os.close(self._lock)
            raise
        self._ordinals = {group.ordinal for group in kept}
        self._next = 1 + max((_number(group.shard) for group in kept), default=-1)

    def __enter__(self) -> RecordingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def append(self, groups: Sequence[Group]) -> None:
        """Record the groups of an update, in this order; they are on the disk when it returns.

        Raises:
            ValueError: an ordinal that is recorded already; nothing was written.
            OSError: no space, say; names the file, and what was recorded before stays readable.
        """
        twice = sorted(self._ordinals & {group.header.ordinal for group in groups})
        if twice:
            raise ValueError(f"{self._directory}: ordinals {twice} are recorded already")
        for part in in_pieces(groups, _bytes, SHARD_BYTES):
            self._append(part)

    def _append(self, groups: Sequence[Group]) -> None:
        name = f"shard-{self._next:06d}.safetensors"
        content = pack(
            {f"{g.header.ordinal}/{key}": tensor for g in groups for key, tensor in g.tensors.items()}
        )
        self._put(name, content)
        lines = []
        if self._facts is None:
            self._facts = Facts.of(self._config, self._run, groups[0])
            lines.append(self._facts.model_dump_json())
        for group in groups:
            encoded = encode_group(group.header, group.tensors)
            recorded = RecordedGroup(
                ordinal=encoded.ordinal,
                shard=name,
                shard_bytes=len(content),
                sha256=encoded.sha256,
                header=encoded.header.decode(),
            )
            lines.append(recorded.model_dump_json())
        place = self._directory / INDEX
        with naming(place), place.open("ab") as index:
            index.write("".join(f"{line}\n" for line in lines).encode())
            index.flush()
            os.fsync(index.fileno())
        os.fsync(self._lock)
        self._ordinals |= {group.header.ordinal for group in groups}
        self._next += 1

    def _hold(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecordingError(f"{self._directory}: another process is writing this recording") from None

    def _rewrite(self, kept: Sequence[RecordedGroup]) -> None:
        """The index of these alone, then no file that it does not name; a kill in between loses neither."""
        lines = [self._facts.model_dump_json()] if self._facts is not None else []
        lines += [group.model_dump_json() for group in kept]
        self._put(INDEX, "".join(f"{line}\n" for line in lines).encode())
        named = {group.shard for group in kept}
        for path in self._directory.iterdir():
            if path.name.endswith(".partial") or (SHARD_NAME.fullmatch(path.name) and path.name not in named):
                path.unlink()

    def _put(self, name: str, content: bytes) -> None:
        partial = self._directory / f".{name}.partial"
        with naming(partial), partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._directory / name)
        os.fsync(self._lock)


def _bytes(group: Group) -> int:
    return sum(tensor.nbytes for tensor in group.tensors.values())


def _number(shard: str) -> int:
    match = SHARD_NAME.fullmatch(shard)
    assert match is not None  # read_index refuses every other name
    return int(match[1])
