"""Which prompt and which seeds an ordinal gets.

Promises
- Everything here is a pure function of (configuration, run seed, ordinal): no state, no order, no epoch.
  A worker on any machine, before or after any crash, derives the same group task. Only a curriculum
  (learner/curriculum.py) gives an ordinal another place in the sequence of prompts than its own number.
- Training and held-out prompts of one source never overlap, nor do those of the lists of a mix; fewer
  held-out ones begin the list of more.

Lists of prompts are in services/prompt_lists.py, several sources together in services/prompt_mix.py.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Final, Protocol

from quickstart.shapes.requests import heldout_requests, training_request
from quickstart.words import heldout_words, prompt_of, train_word
from services.config import Config, PromptSourceConfig
from services.config_file import find
from services.messages import GroupTask, PolicyVersion, Prompt
from services.prompt_lists import HeldoutList, ListedPrompts, open_list, read_list


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
        return Prompt(text=prompt_of(train_word(seeded(seed, "prompt", ordinal))))

    def heldout(self, seed: int, count: int) -> list[Prompt]:
        return [Prompt(text=prompt_of(word)) for word in heldout_words(count, seed)]


class ShapePrompts:
    """Coloured shapes, held out by combination (quickstart/shapes/requests.py). Held-out prompts come from
    six categories in turn; those with few of them repeat theirs."""

    def training(self, seed: int, ordinal: int) -> Prompt:
        request = training_request(seeded(seed, "prompt", ordinal))
        return Prompt(text=request.prompt, metadata=request.metadata)

    def heldout(self, seed: int, count: int) -> list[Prompt]:
        return [
            Prompt(text=request.prompt, metadata=request.metadata)
            for request in heldout_requests(count, seed)
        ]


ENDLESS: Final[Mapping[str, type[PromptSource]]] = {"words": WordPrompts, "shapes": ShapePrompts}
"""Sources that make their own prompts, by the name of `prompts.source`."""


def prompt_source(config: Config) -> PromptSource:
    """The source that a configuration names.

    Raises:
        ConfigError: prompts that are missing, malformed, or overlap held-out ones; a recording that cannot be
            read, or contradicts the configuration.
    """
    prompts = config.prompts
    if prompts.source == "recorded":
        from services.offline import RecordedPrompts  # it imports torch

        return RecordedPrompts(config)
    heldout = None
    if config.eval.path is not None and prompts.source not in ENDLESS:
        heldout = HeldoutList(read_list(find(config.eval.path)), f"eval.path {config.eval.path}")
    if prompts.source == "mix":
        from services.prompt_mix import mixed_prompts

        return mixed_prompts(prompts.mix, heldout)
    return one_source(prompts, heldout)


def one_source(
    config: PromptSourceConfig,
    heldout: HeldoutList | None = None,
    *,
    withheld: frozenset[str] = frozenset(),
) -> PromptSource:
    """The source of one section: the only one, or one of a mix.

    Args:
        heldout: prompts that are held out, where a file says so.
        withheld: texts that must not be trained.
    """
    if config.source in ENDLESS:
        return ENDLESS[config.source]()
    prompts, where = open_list(config)
    if config.heldout_split is not None:
        heldout = HeldoutList(*open_list(config, heldout=True))
    return ListedPrompts(prompts, where, heldout=heldout, share=config.heldout_share, withheld=withheld)


def evaluates(config: Config) -> bool:
    """Whether a run has held-out prompts to evaluate on.

    Raises:
        ConfigError: as `prompt_source`.
    """
    return bool(prompt_source(config).heldout(config.eval.seed, 1))


def sample_seeds(seed: int, purpose: str, ordinal: int, count: int) -> tuple[int, ...]:
    """`count` seeds of 63 bits for the initial noise of a group's samples; fewer begin the list of more."""
    source = seeded(seed, purpose, ordinal)
    return tuple(source.getrandbits(63) for _ in range(count))


def group_task(
    config: Config,
    source: PromptSource,
    run: str,
    ordinal: int,
    attempt: int,
    version: PolicyVersion,
    *,
    place: int | None = None,
) -> GroupTask:
    """The task of an issued ordinal.

    Args:
        place: in the sequence of prompts that it takes; None: its own number.
    """
    place = ordinal if place is None else place
    return GroupTask(
        run=run,
        ordinal=ordinal,
        attempt=attempt,
        place=place,
        prompt=source.training(config.run.seed, place),
        seeds=sample_seeds(config.run.seed, "noise", ordinal, config.rollout.group_size),
        version=version,
    )


def seeded(seed: int, purpose: str, number: int) -> random.Random:
    """Randomness of a purpose. A string seed is hashed with SHA-512, the same on every platform and build."""
    return random.Random(f"dgpo/{seed}/{purpose}/{number}")
