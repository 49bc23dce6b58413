"""The prompts of a run, encoded once for all who need them: where they are, and which they are.

Promises
- Every process of a run looks in the same place, whatever its working directory.
- `prompts_of` are all that a run without a curriculum asks for, unless groups are dead-lettered and replaced:
  what else comes is encoded when it comes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from services.config import Config
from services.prompts import PromptSource

FOLDER = "conditions"
"""In `run.directory`, beside the runs, which share it."""


def condition_cache(config: Config, run_directory: Path | None = None) -> Path | None:
    """The directory of encoded prompts; None: the run has none (`model.text_encoders`).

    Args:
        run_directory: of the run, if there is one yet.
    """
    if config.model.text_encoders != "cached":
        return None
    if config.model.condition_cache is not None:
        return config.model.condition_cache
    runs = run_directory.parent if run_directory is not None else config.run.directory
    return runs.absolute() / FOLDER


def prompts_of(config: Config, source: PromptSource) -> Iterator[str]:
    """Texts of all prompts of a run, in the order in which they are needed first; each once."""
    heldout = source.heldout(config.eval.seed, max(config.eval.prompts, config.eval.final_prompts))
    texts = itertools.chain((prompt.text for prompt in heldout), upcoming(config, source, 0))
    yield from dict.fromkeys(texts)


def upcoming(config: Config, source: PromptSource, place: int, at_most: int | None = None) -> Iterator[str]:
    """Texts of the training prompts from a place on, to that of the run's last group.

    Args:
        at_most: so many; also beyond the last group, where a curriculum leaves prompts out.
    """
    end = config.learner.max_steps * config.learner.groups_per_step
    if at_most is not None:
        end = place + at_most if config.prompts.curriculum.after else min(end, place + at_most)
    for later in range(place, end):
        yield source.training(config.run.seed, later).text
