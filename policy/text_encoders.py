"""Text encoders that are in memory only while a prompt is encoded that the condition cache does not have.

Promises
- While no prompt is missing in the cache, no text encoder is ever loaded; its tokenizers are.
- Outside of `held` an encoder is loaded for one prompt; inside, with the first that is missing, for all that
  follow. At the end its memory is given back.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from policy.base import Condition
from policy.condition_cache import ConditionCache, model_of
from policy.loading import Parts, find_device, load_pipeline
from services.config import ModelConfig

logger = logging.getLogger(__name__)


class CachedConditions:
    """Conditions of a model, on disk.

    Args:
        directory: of the cache, for all models.
        pipeline: with tokenizers; encoders are put into it.
    """

    def __init__(
        self,
        directory: Path,
        pipeline: Any,
        parts: Parts,
        config: ModelConfig,
        location: str,
        index: Mapping[str, Any],
    ) -> None:
        self.cache = ConditionCache(directory, model_of(parts, config, location, index))
        self._pipeline, self._parts, self._config = pipeline, parts, config
        self._location, self._index = location, index
        self._loaded: list[str] = []
        self._holders = 0

    def get(self, prompt: str | None, encode: Callable[[], Condition]) -> Condition:
        """The condition of a prompt; `encode` is called, with encoders loaded, if it is missing."""
        condition = self.cache.read(prompt)
        if condition is None:
            with self.held():
                self._fetch()
                condition = encode()
            self.cache.write(prompt, condition)
        return condition

    @contextmanager
    def held(self) -> Iterator[None]:
        """Encoders that are loaded in here stay to its end."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if self._holders == 0:
                self._free()

    def _fetch(self) -> None:
        if self._loaded:
            return
        logger.info("loading the text encoders: a prompt is not in %s", self.cache.directory)
        whole = load_pipeline(
            *(self._parts, self._config, self._location, self._index),
            text_encoders="all",
            vae=False,
            denoiser=False,
        )
        device = find_device(self._config.device)
        for name in self._parts.encoders:
            encoder = getattr(whole, name)
            if encoder is not None:
                setattr(self._pipeline, name, encoder.requires_grad_(False).to(device))
                self._loaded.append(name)

    def _free(self) -> None:
        if not self._loaded:
            return
        left = [weakref.ref(getattr(self._pipeline, name)) for name in self._loaded]
        for name in self._loaded:
            setattr(self._pipeline, name, None)
        self._loaded.clear()
        # Only where they are in a cycle: looking through all objects takes a while.
        if any(encoder() is not None for encoder in left):
            gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
