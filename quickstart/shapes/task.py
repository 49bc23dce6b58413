"""Coloured shapes as a task to pretrain for: requests, renders, and captions with mistakes.

Wrong captions leave room for post-training as in the text quickstart: the model draws a wrong colour, number
or place as often as its captions told one.
"""

from __future__ import annotations

import random
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quickstart.shapes.render import HEIGHT, WIDTH, render
from quickstart.shapes.requests import (
    NUMBER_WORDS,
    TEMPLATE,
    Request,
    mistaken,
    training_request,
)
from quickstart.text_encoders import Vocabulary
from reward_servers.geneval.rules import RELATIONS
from reward_servers.shape_outlines import COLOURS, SHAPES

WRONG_WORDS: Final = 0.2
"""Share of the words for shapes, colours, numbers and relations in captions that are replaced by another."""
LONGEST_PROMPT: Final = 8
"""Tokens of "a photo of a red star above a blue ring": template, twice article, colour, shape; relation."""

VOCABULARY: Final = Vocabulary(
    # The plural's ending is a token of its own, so that a shape is the same token in every number.
    pieces=(TEMPLATE, "a", "an", "and", *NUMBER_WORDS.values(), *RELATIONS, *COLOURS, *SHAPES, "s", "es"),
    prompt_tokens=LONGEST_PROMPT + 2,
    watched=tuple(range(2, LONGEST_PROMPT + 1)),
    width=56,
)
"""All words are tokens, none depends on what stands beside it."""


class ShapeTask:
    """See quickstart/task.py."""

    height = HEIGHT
    width = WIDTH
    vocabulary = VOCABULARY
    patch = 2
    vae_steps = 600
    vae_batch = 32
    transformer_steps = 4000
    transformer_batch = 64
    images = 16_000

    def example(self, rng: random.Random) -> Request:
        return training_request(rng)

    def render(self, example: Request, rng: random.Random) -> NDArray[np.uint8]:
        return render(example, rng)

    def caption(self, example: Request, rng: random.Random) -> str:
        return mistaken(example, WRONG_WORDS, rng).prompt


TASK: Final = ShapeTask()
