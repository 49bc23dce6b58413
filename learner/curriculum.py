"""The curriculum: leaves out prompts whose last groups were without a difference between good and bad.

The sequence of prompts has a place for every number (services/prompts.py). Without a curriculum an ordinal
takes the place of its own number. With one, the learner assigns places to ordinals ahead of their issue, in
order, and leaves out those whose prompt was solved always, or never, in its last `after` groups.

Promises
- The place of an ordinal is decided once: what is assigned is in the checkpoint, and in the queue before any
  worker can be issued the ordinal. A resume assigns on from there and changes nothing.
- The assignments follow from the configuration, the seed and the trained groups: from those of the updates up
  to the one that first reaches the ordinal (`reach`). With `max_staleness: 0` a run with a curriculum is as
  reproducible as one without.
- A learner that goes back to a checkpoint forgets what it saw after it, and assigns anew what follows.
  Nothing that was sampled by the forgotten assignments is trained: an ordinal beyond the checkpoint's reach
  was issued at a version that the new epoch never had.

Imports no Redis: the loop hands the assignments to the queue.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from learner.advantages import differ, total_rewards
from services.codec import Group
from services.config import Config
from services.config_file import ConfigError
from services.prompts import PromptSource, prompt_source, seeded
from services.queue_types import Frontier

PART = "curriculum"
"""Of a checkpoint."""
LONGEST_SKIP = 1000
"""Places in a row; the one after them is taken: there may be no prompt with a difference."""


def curriculum_of(config: Config) -> Curriculum | None:
    """None for a run without one."""
    if config.prompts.curriculum.after == 0:
        return None
    return Curriculum(config, prompt_source(config))


class Curriculum:
    """The places of all ordinals so far, and what is known of prompts.

    Args:
        config: of the run.
        source: of its prompts.
    """

    def __init__(self, config: Config, source: PromptSource) -> None:
        self._config, self._settings = config, config.prompts.curriculum
        self._source, self._seed = source, config.run.seed
        self._streaks: dict[int, int] = {}
        """Key of a prompt -> how many of its last groups were without a difference, in a row."""
        self._first = 0
        self._places: list[int] = []
        """Of the ordinals from `_first` on."""
        self._next_place = 0

    def observe(self, groups: Sequence[Group]) -> None:
        """The groups of an update, in ordinal order."""
        for group in groups:
            totals = total_rewards(group.header.rewards, self._config.trained_rewards)
            key = _key(group.header.prompt.text)
            if not differ(totals[None])[0] or statistics.pstdev(totals.tolist()) <= self._settings.min_std:
                self._streaks[key] = self._streaks.get(key, 0) + 1
            else:
                self._streaks.pop(key, None)

    def assign(self, frontier: Frontier) -> int:
        """Assign places to all ordinals that can be issued before the next commit.

        Args:
            frontier: what is trained or dead as of now.

        Returns:
            How many places were left out.
        """
        before, wanted = self._next_place, self.reach(frontier.trained) - self._first - len(self._places)
        for _ in range(wanted):
            self._places.append(self._take())
        del self._places[: max(0, frontier.below - self._first)]
        self._first = max(self._first, frontier.below)
        return self._next_place - before - max(0, wanted)

    def reach(self, trained: int) -> int:
        """No ordinal from this one on can be issued while no more than `trained` groups are trained.

        An ordinal is issued while fewer than a window are outstanding, and those below it are outstanding,
        trained or dead; a run bears `queue.max_dead` dead ones.
        """
        queue = self._config.queue
        return trained + (queue.max_staleness + 1) * self._config.learner.groups_per_step + queue.max_dead

    def places(self) -> dict[int, int]:
        """Ordinal -> place, of those that are assigned and not yet trained or dead."""
        return dict(enumerate(self._places, start=self._first))

    def state(self) -> dict[str, Tensor]:
        """Everything a continuation needs."""
        return {
            "keys": torch.tensor(list(self._streaks), dtype=torch.int64),
            "streaks": torch.tensor(list(self._streaks.values()), dtype=torch.int64),
            "places": torch.tensor(self._places, dtype=torch.int64),
            "first": torch.tensor(self._first),
            "next_place": torch.tensor(self._next_place),
        }

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from the state of a checkpoint.

        Raises:
            ConfigError: it has none: the run was begun without a curriculum.
        """
        if PART not in state:
            raise ConfigError(
                "prompts.curriculum: the checkpoint knows of none; a run keeps the prompts it was begun with"
            )
        own = state[PART]
        self._streaks = dict(zip(own["keys"].tolist(), own["streaks"].tolist(), strict=True))
        self._places = own["places"].tolist()
        self._first, self._next_place = int(own["first"]), int(own["next_place"])

    def _take(self) -> int:
        place = self._next_place
        while self._leaves_out(place) and place - self._next_place < LONGEST_SKIP:
            place += 1
        self._next_place = place + 1
        return place

    def _leaves_out(self, place: int) -> bool:
        if not self._streaks:
            return False
        prompt = self._source.training(self._seed, place)
        if self._streaks.get(_key(prompt.text), 0) < self._settings.after:
            return False
        return seeded(self._seed, "revisit", place).random() >= self._settings.revisit


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
