"""Lists of prompts: text, JSONL and parquet files and Hugging Face datasets, shuffled and partly held out.

Promises
- The prompt of an ordinal is computed from (list, seed, ordinal) alone: each pass is a seeded permutation, of
  which no more than the one place is ever computed.
- Whether a prompt is held out by a share follows from its text alone: not from its place in the list, the
  seed or the other sources. What is held out is never trained; a held-out file that shares one is refused.
- A line or a row that is no prompt is refused with its number, never skipped.

Parquet files and datasets: services/prompt_tables.py.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from services.config.prompts import PromptSourceConfig
from services.config_file import ConfigError, find
from services.messages import Prompt

ROUNDS = 8


class PromptList(Protocol):
    """Prompts by their row; nothing else is kept of a large table."""

    def __len__(self) -> int: ...

    def texts(self) -> Iterator[str]:
        """Of every row, in order."""
        ...

    def prompt(self, row: int) -> Prompt: ...


class ListedPrompts:
    """A list as a source (services/prompts.py `PromptSource`).

    Args:
        prompts: the list.
        where: it is, for errors.
        heldout: another list whose prompts are held out.
        share: or the share of its own prompts that is.
        withheld: texts that are not to be trained whatever this list says of them.

    Raises:
        ConfigError: a held-out prompt is in both lists, or nothing is left to train on.
    """

    def __init__(
        self,
        prompts: PromptList,
        where: str,
        *,
        heldout: HeldoutList | None = None,
        share: float = 0.0,
        withheld: frozenset[str] = frozenset(),
    ) -> None:
        self._prompts = prompts
        self._heldout = heldout
        self._rows: Sequence[int] = range(len(prompts))
        if heldout is not None:
            heldout.refuse(set(prompts.texts()), where)
        if share > 0 or withheld:
            texts = list(prompts.texts())
            own = [row for row, text in enumerate(texts) if held_out(text, share)]
            apart = withheld.union(texts[row] for row in own)
            self._rows = [row for row, text in enumerate(texts) if text not in apart]
            if own:
                self._heldout = HeldoutList(_Selected(prompts, own), where)
        if not self._rows:
            raise ConfigError(f"{where}: every prompt is held out, none is left to train on")

    def training(self, seed: int, ordinal: int) -> Prompt:
        turn, place = divmod(ordinal, len(self._rows))
        return self._prompts.prompt(self._rows[permuted(seed, turn, len(self._rows), place)])

    def heldout(self, seed: int, count: int) -> list[Prompt]:
        return self._heldout.heldout(seed, count) if self._heldout is not None else []


class HeldoutList:
    """Held-out prompts in an order that follows from a seed.

    Args:
        prompts: all of them.
        where: they are, for errors.
    """

    def __init__(self, prompts: PromptList, where: str) -> None:
        self._prompts, self._where = prompts, where

    def texts(self) -> frozenset[str]:
        return frozenset(self._prompts.texts())

    def refuse(self, trained: set[str], source: str) -> None:
        """Raises ConfigError where one of `trained`, which `source` has, is held out."""
        shared = trained & self.texts()
        if shared:
            raise ConfigError(
                f"{self._where}: {len(shared)} prompts are also in {source}, "
                f"for example {min(shared)!r}; held-out prompts must not be trained on"
            )

    def heldout(self, seed: int, count: int) -> list[Prompt]:
        order = list(range(len(self._prompts)))
        random.Random(f"dgpo/{seed}/heldout/0").shuffle(order)
        return [self._prompts.prompt(row) for row in order[:count]]


def permuted(seed: int, turn: int, size: int, place: int) -> int:
    """Where `place` of `range(size)` goes in pass `turn`: a seeded permutation, one place at a time.

    A Feistel network over the next power of four, walked until it is inside.

    >>> sorted(permuted(0, 3, 100, place) for place in range(100)) == list(range(100))
    True
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for number in range(ROUNDS):
            text = f"dgpo/{seed}/pass/{turn}/{number}/{right}"
            drawn = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
            left, right = right, left ^ (drawn & mask)
        place = left << half | right
        if place < size:
            return place


def held_out(text: str, share: float) -> bool:
    """Whether a share of all prompts that is held out has this one in it; a larger share has it too."""
    digest = hashlib.sha256(f"dgpo/heldout/{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def open_list(config: PromptSourceConfig, *, heldout: bool = False) -> tuple[PromptList, str]:
    """The list of a `file` or `dataset` source, and where it is.

    Args:
        heldout: that of `heldout_split` instead.

    Raises:
        ConfigError: it cannot be had, or is not as the configuration says.
    """
    if config.source == "dataset":
        split = config.heldout_split if heldout else config.split
        from services.prompt_tables import read_dataset

        assert config.dataset is not None
        assert split is not None
        prompts = read_dataset(
            config.dataset,
            split,
            subset=config.subset,
            revision=config.revision,
            text_column=config.text_column,
            metadata_columns=config.metadata_columns,
        )
        return prompts, f"dataset {config.dataset}, split {split}"
    assert config.path is not None  # PromptSourceConfig refuses a file source without a path
    path = find(config.path)
    return read_list(path, config.text_column, config.metadata_columns), str(path)


def read_list(
    path: Path, text_column: str = "prompt", metadata_columns: Sequence[str] | None = None
) -> PromptList:
    """The prompts of a file, or of a directory of parquet files.

    Raises:
        ConfigError: no such file, an empty one, or a line or a row that is not a prompt.
    """
    if path.is_dir() or path.suffix == ".parquet":
        from services.prompt_tables import read_parquet

        return read_parquet(path, text_column, metadata_columns)
    return ReadPrompts(read_prompts(path, text_column, metadata_columns))


class ReadPrompts:
    """Prompts in memory."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts

    def __len__(self) -> int:
        return len(self._prompts)

    def texts(self) -> Iterator[str]:
        return (prompt.text for prompt in self._prompts)

    def prompt(self, row: int) -> Prompt:
        return self._prompts[row]


class _Selected:
    """Some rows of a list."""

    def __init__(self, prompts: PromptList, rows: Sequence[int]) -> None:
        self._prompts, self._rows = prompts, rows

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self) -> Iterator[str]:
        chosen = set(self._rows)
        return (text for row, text in enumerate(self._prompts.texts()) if row in chosen)

    def prompt(self, row: int) -> Prompt:
        return self._prompts.prompt(self._rows[row])


def read_prompts(
    path: Path, text_column: str = "prompt", metadata_columns: Sequence[str] | None = None
) -> list[Prompt]:
    """Prompts of a .txt (one a line) or .jsonl file ({"prompt": ..., other keys become metadata}).

    Raises:
        ConfigError: no such file, an empty one, or a line that is not a prompt (with its number).
    """
    try:
        # Not splitlines: it also splits at characters that JSON allows inside a text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts {path}: cannot be read: {error}") from error
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(
            f"prompts {path}: expected a .txt, .jsonl or .parquet file, the ending is {path.suffix!r}"
        )
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(Prompt(text=line.strip()))
            continue
        try:
            prompts.append(_prompt_of(line, text_column, metadata_columns))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ConfigError(
                f"{path}, line {number}: expected a JSON object with a {text_column!r} text: {error}"
            ) from error
    if not prompts:
        raise ConfigError(f"prompts {path}: holds no prompt")
    return prompts


def _prompt_of(line: str, text_column: str, metadata_columns: Sequence[str] | None) -> Prompt:
    record = json.loads(line, parse_constant=_refuse_constant)
    text = record.pop(text_column).strip()
    text.encode()
    if not text:
        raise ValueError("the prompt is empty")
    if metadata_columns is not None:
        record = {key: record[key] for key in metadata_columns if key in record}
    return Prompt(text=text, metadata=record)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
