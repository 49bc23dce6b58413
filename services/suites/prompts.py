"""The prompts of a suite: by name, or any list of prompts.

    geneval      GenEval's 553 prompts with their metadata (reward_servers/geneval/prompts.py)
    ocr          300 prompts that ask for text (written_text.py)
    drawbench    DrawBench; its list is not shipped, say where it is with --prompts
    heldout      the held-out prompts of the recipe
    FILE         .txt, .jsonl or .parquet
    dataset:NAME@COMMIT[:SPLIT]   on the Hugging Face hub

Promises
- The same name gives the same prompts in the same order, whatever the machine; a digest of them is part of
  what an evaluation depends on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.config import Config
from services.config_file import ConfigError, find
from services.messages import Prompt
from services.prompt_lists import PromptList, read_list
from services.prompts import prompt_source

NAMES: Final = ("geneval", "ocr", "drawbench", "heldout")
DATASET: Final = re.compile(r"dataset:(?P<name>[^@:]+)(?:@(?P<revision>[0-9a-f]{40}))?(?::(?P<split>\S+))?")


@dataclass(frozen=True)
class Suite:
    """What an evaluation asks for."""

    name: str
    prompts: tuple[Prompt, ...]
    tags: tuple[str | None, ...]
    """Of each prompt; None for one without."""

    @property
    def digest(self) -> str:
        """Of texts, metadata and order."""
        content = [[prompt.text, prompt.metadata] for prompt in self.prompts]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Columns:
    """Where a list has text and tag; None: the default of the suite."""

    text: str | None = None
    tag: str | None = None


def load_suite(
    name: str,
    config: Config,
    *,
    prompts: str | None = None,
    columns: Columns | None = None,
    limit: int | None = None,
) -> Suite:
    """The suite of a name.

    Args:
        name: as above.
        config: whose held-out prompts `heldout` are.
        prompts: where the list of a suite is that is not shipped: a file or a dataset.
        columns: of a list.
        limit: so many prompts only, the first ones.

    Raises:
        ConfigError: there is no such suite, or its prompts cannot be had; the text says what would do.
    """
    columns = columns or Columns()
    if prompts is not None and name != "drawbench":
        raise ConfigError(f"--prompts is for --suite drawbench; suite {name!r} says itself where its are")
    if name in ("geneval", "ocr", "heldout") and columns != Columns():
        raise ConfigError(f"--text-column and --tag-column are for lists; suite {name!r} has none to choose")
    found = _prompts(name, config, prompts, columns)
    if limit is not None:
        found = found[:limit]
    tags = tuple(_tag(prompt, _tag_column(name, columns)) for prompt in found)
    # A file that has moved is still the same suite; the digest tells one from another.
    return Suite(name if name.startswith("dataset:") else Path(name).name, tuple(found), tags)


def _prompts(name: str, config: Config, prompts: str | None, columns: Columns) -> list[Prompt]:
    if name == "geneval":
        from reward_servers.geneval.prompts import evaluation_records

        return [Prompt(text=record["prompt"], metadata=_rest(record)) for record in evaluation_records()]
    if name == "ocr":
        from services.suites.written_text import written_text_prompts

        return written_text_prompts()
    if name == "heldout":
        heldout = prompt_source(config).heldout(config.eval.seed, config.eval.final_prompts)
        if not heldout:
            raise ConfigError(
                "--suite heldout: the recipe holds no prompts out; --set eval.path=FILE gives some"
            )
        return heldout
    if name == "drawbench":
        if prompts is None:
            raise ConfigError(
                "--suite drawbench: the list of DrawBench's prompts is not shipped, its licence is unclear; "
                "say where yours is: --prompts FILE (.txt, .jsonl or .parquet), or --prompts "
                "dataset:NAME@COMMIT[:SPLIT] of the Hugging Face hub; columns Prompts and Category, unless "
                "--text-column and --tag-column say others"
            )
        return _whole(_list(prompts, columns.text or "Prompts"))
    return _whole(_list(name, columns.text or "prompt"))


def _list(place: str, text_column: str) -> PromptList:
    told = DATASET.fullmatch(place)
    if told is not None:
        from services.prompt_tables import read_dataset

        if told["revision"] is None:
            raise ConfigError(
                f"{place}: say which commit, dataset:NAME@COMMIT with its 40 hexadecimal digits: a branch "
                "may change between two evaluations"
            )
        split = told["split"] or "train"
        return read_dataset(told["name"], split, revision=told["revision"], text_column=text_column)
    path = find(place)
    if not path.exists():
        raise ConfigError(
            f"--suite {place!r}: neither a file nor one of {', '.join(NAMES)} or dataset:NAME@COMMIT[:SPLIT]"
        )
    return read_list(path, text_column)


def _whole(found: PromptList) -> list[Prompt]:
    return [found.prompt(row) for row in range(len(found))]


def _tag_column(name: str, columns: Columns) -> str:
    return columns.tag or ("Category" if name == "drawbench" else "tag")


def _tag(prompt: Prompt, column: str) -> str | None:
    tag = prompt.metadata.get(column)
    return None if tag is None else str(tag)


def _rest(record: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in record.items() if key != "prompt"}


def tags_of(suite: Suite) -> Sequence[str]:
    """The tags in the order in which they first occur."""
    return list(dict.fromkeys(tag for tag in suite.tags if tag is not None))
