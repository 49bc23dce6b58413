"""The prompt space of the quickstart: words of exactly four characters, A-Z and 0-9.

Promises
- Whether a word is held out follows from its SHA-256 alone: training and held-out words are disjoint by
  construction, for every seed and on every machine, and pretraining uses training words only.
- `train_word` and `heldout_words` draw from the same law: mostly random strings, `ENGLISH_SHARE` of them
  English words.
- O stands among letters only and 0 among digits, since no reader could tell them apart otherwise.
- Only the standard library, no global random state.
"""

import hashlib
import random
from functools import cache
from pathlib import Path
from typing import Final

CHARACTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
WORD_LENGTH: Final = 4
ENGLISH_SHARE: Final = 0.1
HELDOUT_ONE_IN: Final = 10
TEMPLATE_PREFIX: Final = 'a sign that says "'
TEMPLATE_SUFFIX: Final = '"'


@cache
def english_words() -> tuple[str, ...]:
    """The English words of the prompt space, upper case, sorted, training and held-out ones together."""
    return tuple(Path(__file__).with_name("english.txt").read_text(encoding="ascii").split())


def is_heldout(word: str) -> bool:
    """True for about one word in `HELDOUT_ONE_IN`; such a word is never trained on.

    >>> is_heldout("K7QX")
    False
    """
    digest = hashlib.sha256(word.encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0


def train_word(rng: random.Random) -> str:
    """One word that is not held out; repeated calls may return the same word."""
    while is_heldout(word := _any_word(rng)):
        pass
    return word


def heldout_words(count: int, seed: int) -> list[str]:
    """`count` distinct held-out words, the same ones for the same seed.

    A longer list with the same seed begins with the shorter one.
    """
    rng = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < count:
        if is_heldout(word := _any_word(rng)):
            words[word] = None
    return list(words)


def prompt_of(word: str) -> str:
    """The prompt that asks for an image of `word`.

    >>> prompt_of("K7QX")
    'a sign that says "K7QX"'
    """
    return f"{TEMPLATE_PREFIX}{word}{TEMPLATE_SUFFIX}"


def _any_word(rng: random.Random) -> str:
    if rng.random() < ENGLISH_SHARE:
        return rng.choice(english_words())
    while not _is_legible(word := "".join(rng.choices(CHARACTERS, k=WORD_LENGTH))):
        pass
    return word


def _is_legible(word: str) -> bool:
    """False where O and 0 could be taken for each other: readers tell them apart by their neighbours.

    >>> [_is_legible(word) for word in ("OVEN", "OV3N", "7038", "703K", "70EK")]
    [True, False, True, True, False]
    """
    digits = sum(character.isdigit() for character in word)
    return not ("O" in word and digits > 0) and not ("0" in word and digits < 3)
