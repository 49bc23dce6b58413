"""Several sources of prompts, drawn by weight.

Promises
- Which source an ordinal draws from is a pure function of (seed, weights, ordinal), and so is the number of
  times it was drawn before: its ordinal in the source. Each list is gone through whole before it repeats.
- A source's own order follows from its name: adding another source, or changing weights, keeps it.
- A prompt that one list holds out is trained from none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest

from services.config import MixedSourceConfig
from services.config_file import ConfigError, find
from services.messages import Prompt
from services.prompt_lists import HeldoutList, held_out, open_list, read_list
from services.prompts import PromptSource, one_source, seeded

BLOCK = 1024


class MixedPrompts:
    """Sources with weights, as one source.

    Args:
        sources: name -> source.
        weights: relative, in the order of the sources.
        heldout: the held-out prompts of all, instead of those that each source holds out.
    """

    def __init__(
        self, sources: dict[str, PromptSource], weights: Sequence[float], heldout: HeldoutList | None = None
    ) -> None:
        self._names, self._sources = tuple(sources), tuple(sources.values())
        self._weights, self._heldout = tuple(weights), heldout
        self._before: dict[int, list[tuple[int, ...]]] = {}

    def training(self, seed: int, ordinal: int) -> Prompt:
        chosen, turn = self.drawn(seed, ordinal)
        return self._sources[chosen].training(self._own_seed(seed, chosen), turn)

    def heldout(self, seed: int, count: int) -> list[Prompt]:
        if self._heldout is not None:
            return self._heldout.heldout(seed, count)
        # One of each in turn, so that a shorter list begins a longer one.
        lists = [source.heldout(seed, count) for source in self._sources]
        turns = [prompt for turn in zip_longest(*lists) for prompt in turn if prompt is not None]
        return turns[:count]

    def drawn(self, seed: int, ordinal: int) -> tuple[int, int]:
        """Which source an ordinal draws from, and how often that was drawn by lower ordinals."""
        number, offset = divmod(ordinal, BLOCK)
        block = _draws(seed, number, self._weights)
        before = self._before.setdefault(seed, [(0,) * len(self._weights)])
        while len(before) <= number:
            last = _draws(seed, len(before) - 1, self._weights)
            before.append(tuple(count + last.count(i) for i, count in enumerate(before[-1])))
        chosen = block[offset]
        return chosen, before[number][chosen] + block[:offset].count(chosen)

    def _own_seed(self, seed: int, chosen: int) -> int:
        return seeded(seed, f"source {self._names[chosen]}", 0).getrandbits(31)


@lru_cache(maxsize=256)
def _draws(seed: int, number: int, weights: tuple[float, ...]) -> tuple[int, ...]:
    """The sources of `BLOCK` ordinals."""
    return tuple(seeded(seed, "mix", number).choices(range(len(weights)), weights=weights, k=BLOCK))


def mixed_prompts(mix: Sequence[MixedSourceConfig], heldout: HeldoutList | None) -> MixedPrompts:
    """The sources of a configuration.

    Args:
        heldout: the held-out prompts of all sources (`eval.path`), if they are said in one place.

    Raises:
        ConfigError: as of each source; it is named.
    """
    files = {
        config.name: HeldoutList(read_list(find(config.heldout_path)), f"heldout_path {config.heldout_path}")
        for config in mix
        if config.heldout_path is not None
    }
    withheld = _withheld(mix, files)
    sources: dict[str, PromptSource] = {}
    for config in mix:
        try:
            given = heldout if config.source in ("file", "dataset") else None
            sources[config.name] = one_source(config, files.get(config.name, given), withheld=withheld)
        except ConfigError as error:
            raise ConfigError(f"prompts.mix, source {config.name!r}: {error}") from error
    return MixedPrompts(sources, [config.weight for config in mix], heldout)


def _withheld(mix: Sequence[MixedSourceConfig], files: dict[str, HeldoutList]) -> frozenset[str]:
    """The texts that some list holds out."""
    found = [held.texts() for held in files.values()]
    for config in mix:
        if config.heldout_share > 0:
            texts = open_list(config)[0].texts()
            found.append(frozenset(text for text in texts if held_out(text, config.heldout_share)))
        if config.heldout_split is not None:
            found.append(frozenset(open_list(config, heldout=True)[0].texts()))
    return frozenset().union(*found)
