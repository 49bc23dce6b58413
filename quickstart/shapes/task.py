"""Coloured shapes as a task to pretrain for: requests, renders, and captions with mistakes.

Wrong captions leave room for post-training as in the text quickstart: the model draws a wrong colour, number
or place as often as its captions told one.
"""

from __future__ import annotations

import random
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quickstart.base_model import FLOW_SHIFT
from quickstart.shapes.render import HEIGHT, WIDTH, render
from quickstart.shapes.requests import (
    NUMBER_WORDS,
    TEMPLATE,
    Request,
    mistaken,
    training_request,
    with_article,
)
from quickstart.text_encoders import Vocabulary
from reward_servers.geneval.task import RELATIONS
from reward_servers.shapes.outlines import COLOURS, SHAPES

WRONG_WORDS: Final = 0.1
"""Share of the words for shapes, colours, numbers and relations in captions that are replaced by another."""
LONGEST_PROMPT: Final = 6
"""Tokens of "a photo of a red star and a blue ring": template; twice colour, shape; "and" or a relation."""

VOCABULARY: Final = Vocabulary(
    # An article is one token with the colour behind it, so that a shape has the same place with a colour and
    # without; a plural's ending is a token of its own, so that a shape is the same token in every number.
    pieces=(
        *(TEMPLATE, "a", "and", *NUMBER_WORDS.values(), *RELATIONS),
        *(with_article(colour) for colour in COLOURS),
        *(*SHAPES, "s", "es"),
    ),
    prompt_tokens=LONGEST_PROMPT + 2,
    watched=tuple(range(2, LONGEST_PROMPT + 1)),
    width=40,
    pivot=4,
)
"""A shape's token tells its colour, and in the second half the relation, as those of a trained encoder do."""


class ShapeTask:
    """See quickstart/task.py."""

    height = HEIGHT
    width = WIDTH
    vocabulary = VOCABULARY
    patch = 2
    vae_steps = 1500
    vae_batch = 32
    transformer_steps = 12_000
    transformer_batch = 64
    noise_shift = FLOW_SHIFT
    images = 96_000

    def example(self, rng: random.Random) -> Request:
        return training_request(rng)

    def render(self, example: Request, rng: random.Random) -> NDArray[np.uint8]:
        return render(example, rng)

    def caption(self, example: Request, rng: random.Random) -> str:
        return mistaken(example, WRONG_WORDS, rng).prompt


TASK: Final = ShapeTask()
