"""What a base model is pretrained for: a task says what there is to draw and how it is asked for.

The pretraining (pretrain.py) knows nothing else of a task, so that one code makes the models of all.
"""

from __future__ import annotations

import importlib
import random
from typing import Any, Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from quickstart.text_encoders import Vocabulary

Example = TypeVar("Example")

_MODULES: Final = {"words": "quickstart.word_task", "shapes": "quickstart.shapes.task"}
TASKS: Final = tuple(_MODULES)
"""The names that `load_task` takes."""


class Task(Protocol[Example]):
    """A text-to-image task small enough for two CPU cores; every random number comes from `rng`."""

    height: int
    """Of an image, in pixels; a multiple of 8, as is `width`."""
    width: int
    vocabulary: Vocabulary
    """How prompts become tokens."""
    patch: int
    """Side of the square of latents that is one token of the transformer."""
    vae_steps: int
    """Steps of the autoencoder's training, of `vae_batch` images each."""
    vae_batch: int
    transformer_steps: int
    """Steps of the transformer's training, of `transformer_batch` images each."""
    transformer_batch: int
    noise_shift: float
    """Shift of the noise levels that the transformer is trained at; above 1 where layout is hard."""
    images: int
    """Ground truth that the transformer is trained on, a multiple of 1000."""

    def example(self, rng: random.Random) -> Example:
        """Something to draw that is not held out."""
        ...

    def render(self, example: Example, rng: random.Random) -> NDArray[np.uint8]:
        """(height, width, 3) RGB, the ground truth."""
        ...

    def caption(self, example: Example, rng: random.Random) -> str:
        """The prompt that asks for it, with the task's share of deliberate mistakes; never a held-out one."""
        ...


def load_task(name: str) -> Task[Any]:
    """The task of one of `TASKS`."""
    task: Task[Any] = importlib.import_module(_MODULES[name]).TASK
    return task
