"""The text quickstart as a task to pretrain for: words, their renders, and captions that misspell them.

Wrong captions are what leaves room for post-training: a model that fits them faithfully spells a word wrong
as often as its captions did, though it has seen every letter; guidance, or DGPO, brings it out.
"""

from __future__ import annotations

import random
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quickstart.render import HEIGHT, WIDTH, render
from quickstart.text_encoders import WORDS
from quickstart.words import CHARACTERS, prompt_of, train_word

WRONG_CHARACTERS: Final = 0.27
"""Share of the characters in captions that are replaced by a random one."""


class WordTask:
    """See quickstart/task.py."""

    height = HEIGHT
    width = WIDTH
    vocabulary = WORDS
    patch = 2
    vae_steps = 900
    vae_batch = 24
    transformer_steps = 3000
    transformer_batch = 96
    noise_shift = 1.0
    images = 12_000

    def example(self, rng: random.Random) -> str:
        return train_word(rng)

    def render(self, example: str, rng: random.Random) -> NDArray[np.uint8]:
        return render(example, rng)

    def caption(self, example: str, rng: random.Random) -> str:
        return prompt_of(misspelt(example, rng))


def misspelt(word: str, rng: random.Random) -> str:
    """`word` with each character replaced by a random one with probability `WRONG_CHARACTERS`."""
    return "".join(rng.choice(CHARACTERS) if rng.random() < WRONG_CHARACTERS else c for c in word)


TASK: Final = WordTask()
