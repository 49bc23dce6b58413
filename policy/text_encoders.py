"""How the policy of a stock pipeline encodes prompts, with text encoders where the configuration has them.

Promises, of `cached` ones, which are in memory only while a prompt is encoded that the condition cache does
not have
- While no prompt is missing in the cache, no text encoder is ever loaded; its tokenizers are.
- Outside of `held` an encoder is loaded for one prompt; inside, with the first that is missing, for all that
  follow. At the end its memory is given back.
"""

from __future__ import annotations

import gc
import logging
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from policy.base import Condition, Policy
from policy.condition_cache import ConditionCache, model_of
from policy.errors import PolicyError
from policy.loading import Configs, Parts, check_numbers, find_device, load_pipeline, quiet
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
        encoders = {name: getattr(whole, name) for name in self._parts.encoders}
        encoders = {name: encoder for name, encoder in encoders.items() if encoder is not None}
        for encoder in encoders.values():
            encoder.requires_grad_(False).to(device)
        # Before anybody can encode with them; what is trained is in the other pipeline.
        check_numbers(whole, self._parts, self._location)
        for name, encoder in encoders.items():
            setattr(self._pipeline, name, encoder)
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


@contextmanager
def lent(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Frozen modules of the host on a device, inside the block. Their elements never leave the host, so that
    nothing is copied back: of T5-XXL that would be 9.5 GB for each prompt, into memory that is new each time.
    """
    kept = [(one, one.data) for module in modules for one in (*module.parameters(), *module.buffers())]
    try:
        for tensor, elements in kept:
            tensor.data = elements.to(device)
        yield
    finally:
        for tensor, elements in kept:
            tensor.data = elements
        for module in modules:
            # A buffer that was made anew in between.
            module.to("cpu")


class PromptEncoding(Policy):
    """The encoding of prompts by the parts of a stock pipeline; a family says how (`_condition`)."""

    parts: ClassVar[Parts]
    _configs: Configs
    _cached: CachedConditions | None

    @classmethod
    @abstractmethod
    def condition_widths(cls, denoiser: Mapping[str, Any]) -> dict[str, int]:
        """Tensors of a condition -> their last dimension, as a denoiser's configuration has it."""

    @abstractmethod
    def _condition(self, prompt: str, device: torch.device) -> Condition:
        """The condition of one prompt, from the stock pipeline's `encode_prompt` on a device."""

    def prepared(self, prompt: str) -> bool:
        return self._cached is None or self._cached.cache.has(prompt)

    def prepare(
        self,
        prompts: Iterable[str],
        *,
        negative: bool = False,
        done: Callable[[str], None] = lambda prompt: None,
    ) -> None:
        if self._cached is None:
            return
        with self._cached.held():
            for prompt in dict.fromkeys(prompts):
                # Asked for each: another process may have encoded it meanwhile.
                if not self.prepared(prompt):
                    self._encode(prompt)
                done(prompt)
            if negative:
                self.negative()

    def _encode(self, prompt: str) -> Condition:
        return self._encoded_by(prompt, lambda device: self._condition(prompt, device))

    def _encoded_by(self, prompt: str | None, make: Callable[[torch.device], Condition]) -> Condition:
        """A condition, from the cache on disk if there is one; None is the negative one's name there."""

        def encode() -> Condition:
            with self._encoding() as device:
                return self._on_device(make(device))

        found = encode() if self._cached is None else self._on_device(self._cached.get(prompt, encode))
        self._check_conditions([found])
        return found

    @contextmanager
    def _encoding(self) -> Iterator[torch.device]:
        """Text encoders at work, on the device that is given."""
        encoders = {name: getattr(self.pipeline, name) for name in self.parts.encoders}
        if any(encoder is None for name, encoder in encoders.items() if name not in self.parts.optional):
            raise PolicyError("the text encoders are not loaded: load the policy with text_encoders=True")
        loaded = [encoder for encoder in encoders.values() if encoder is not None]
        placement = self.config.text_encoders
        device = torch.device("cpu") if placement == "cpu" else self.device
        # Cached ones that were loaded for good: of an export, say.
        moved = placement == "offload" or (placement == "cached" and self._cached is None)
        # no_grad and not inference_mode: the learner trains on these tensors. Quiet: the length is the
        # configuration's choice, so what it truncates is no news, once a prompt.
        with lent(loaded, device) if moved else nullcontext(), torch.no_grad(), quiet():
            yield device

    def _check_conditions(self, conditions: Sequence[Condition]) -> None:
        for name, wanted in self.condition_widths(self._configs.denoiser).items():
            for condition in conditions:
                found = None if name not in condition else condition[name].shape[-1]
                if found != wanted:
                    raise PolicyError(
                        f"{self.config.path}: the {self.parts.denoiser} wants {name} of width {wanted}, the "
                        f"condition has {found or 'none'}; text encoders and {self.parts.denoiser} must come "
                        "from one model"
                    )

    def _on_device(self, condition: Condition) -> Condition:
        return {name: tensor.to(self.device) for name, tensor in condition.items()}
