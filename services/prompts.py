"""Which prompt and which seeds an ordinal gets.

Promises
- Everything here is a pure function of (configuration, run seed, ordinal): no state, no order, no epoch.
  A worker on any machine, before or after any crash, derives the same group task.
- Training and held-out prompts of one source never overlap; fewer held-out ones begin the list of more.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final, Protocol

from quickstart.shapes.requests import heldout_requests, training_request
from quickstart.words import heldout_words, prompt_of, train_word
from services.config import Config
from services.config_file import ConfigError, find
from services.messages import GroupTask, PolicyVersion, Prompt


class PromptSource(Protocol):
    """Where prompts come from."""

    def training(self, seed: int, ordinal: int) -> Prompt:
        """The prompt of an ordinal."""
        ...

    def heldout(self, seed: int, count: int) -> list[Prompt]:
        """Up to `count` prompts that `training` never returns; empty if the source has none.

        A shorter list is the beginning of a longer one, so that evaluations are paired.
        """
        ...


class WordPrompts:
    """The quickstart's text rendering task: an endless supply of words (quickstart/words.py)."""

    def training(self, seed: int, ordinal: int) -> Prompt:
        return Prompt(text=prompt_of(train_word(_random(seed, "prompt", ordinal))))

    def heldout(self, seed: int, count: int) -> list[Prompt]:
        return [Prompt(text=prompt_of(word)) for word in heldout_words(count, seed)]


class ShapePrompts:
    """Coloured shapes, held out by combination (quickstart/shapes/requests.py). Held-out prompts come from
    six categories in turn; those with few of them repeat theirs."""

    def training(self, seed: int, ordinal: int) -> Prompt:
        request = training_request(_random(seed, "prompt", ordinal))
        return Prompt(text=request.prompt, metadata=request.metadata)

    def heldout(self, seed: int, count: int) -> list[Prompt]:
        return [
            Prompt(text=request.prompt, metadata=request.metadata)
            for request in heldout_requests(count, seed)
        ]


ENDLESS: Final[Mapping[str, type[PromptSource]]] = {"words": WordPrompts, "shapes": ShapePrompts}
"""Sources that make their own prompts, by the name of `prompts.source`."""


class FilePrompts:
    """Prompts of a file, shuffled anew in each pass; held-out ones from a file of their own."""

    def __init__(self, path: Path, heldout_path: Path | None) -> None:
        self._prompts = read_prompts(path)
        self._heldout: HeldoutFile | None = None
        if heldout_path is not None:
            self._heldout = HeldoutFile(heldout_path, {p.text for p in self._prompts}, str(path))

    def training(self, seed: int, ordinal: int) -> Prompt:
        turn, place = divmod(ordinal, len(self._prompts))
        return self._prompts[pass_order(seed, turn, len(self._prompts))[place]]

    def heldout(self, seed: int, count: int) -> list[Prompt]:
        return self._heldout.heldout(seed, count) if self._heldout is not None else []


class HeldoutFile:
    """The held-out prompts of `eval.path`.

    Args:
        path: of the file.
        trained: texts that are trained on.
        source: where those are, for the error.

    Raises:
        ConfigError: a prompt is in both.
    """

    def __init__(self, path: Path, trained: set[str], source: str) -> None:
        self._prompts = read_prompts(path)
        shared = trained & {prompt.text for prompt in self._prompts}
        if shared:
            raise ConfigError(
                f"eval.path {path}: {len(shared)} prompts are also in {source}, "
                f"for example {min(shared)!r}; held-out prompts must not be trained on"
            )

    def heldout(self, seed: int, count: int) -> list[Prompt]:
        shuffled = list(self._prompts)
        _random(seed, "heldout", 0).shuffle(shuffled)
        return shuffled[:count]


def read_prompts(path: Path) -> list[Prompt]:
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
        raise ConfigError(f"prompts {path}: expected a .txt or a .jsonl file, the ending is {path.suffix!r}")
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(Prompt(text=line.strip()))
            continue
        try:
            record = json.loads(line, parse_constant=_refuse_constant)
            prompts.append(Prompt(text=record.pop("prompt").strip(), metadata=record))
            prompts[-1].text.encode()
            if not prompts[-1].text:
                raise ValueError("the prompt is empty")
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ConfigError(
                f"{path}, line {number}: expected a JSON object with a 'prompt' text: {error}"
            ) from error
    if not prompts:
        raise ConfigError(f"prompts {path}: holds no prompt")
    return prompts


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def prompt_source(config: Config) -> PromptSource:
    """The source that a configuration names.

    Raises:
        ConfigError: a prompt file that is missing, malformed, or overlaps the held-out one; a recording that
            cannot be read, or contradicts the configuration.
    """
    if config.prompts.source in ENDLESS:
        return ENDLESS[config.prompts.source]()
    if config.prompts.source == "recorded":
        from services.offline import RecordedPrompts  # it imports torch

        return RecordedPrompts(config)
    assert config.prompts.path is not None  # PromptsConfig refuses a file source without a path
    heldout = find(config.eval.path) if config.eval.path is not None else None
    return FilePrompts(find(config.prompts.path), heldout)


def evaluates(config: Config) -> bool:
    """Whether a run has held-out prompts to evaluate on.

    Raises:
        ConfigError: as `prompt_source`.
    """
    return bool(prompt_source(config).heldout(config.eval.seed, 1))


def sample_seeds(seed: int, purpose: str, ordinal: int, count: int) -> tuple[int, ...]:
    """`count` seeds of 63 bits for the initial noise of a group's samples."""
    source = _random(seed, purpose, ordinal)
    return tuple(source.getrandbits(63) for _ in range(count))


def group_task(
    config: Config, source: PromptSource, run: str, ordinal: int, attempt: int, version: PolicyVersion
) -> GroupTask:
    """The task of an issued ordinal."""
    return GroupTask(
        run=run,
        ordinal=ordinal,
        attempt=attempt,
        prompt=source.training(config.run.seed, ordinal),
        seeds=sample_seeds(config.run.seed, "noise", ordinal, config.rollout.group_size),
        version=version,
    )


@lru_cache(maxsize=2)
def pass_order(seed: int, turn: int, size: int) -> tuple[int, ...]:
    """The order in which pass `turn` goes through `size` prompts or recorded groups."""
    order = list(range(size))
    _random(seed, "pass", turn).shuffle(order)
    return tuple(order)


def _random(seed: int, purpose: str, number: int) -> random.Random:
    # A string seed is hashed with SHA-512, the same on every platform and Python build.
    return random.Random(f"dgpo/{seed}/{purpose}/{number}")
