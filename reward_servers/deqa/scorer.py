"""The DeQA scorer: the published network behind the formula of formula.py.

Promises
- Code beside the weights is run, and it is the only place of the project where that happens: whoever makes a
  DeqaScorer has been allowed to (see __main__.py).
- Everything comes from one local directory; weights from safetensors only. A checkpoint that lacks weights is
  refused.
- Logits that are not finite are an error of the item, never a score.

Not batch-invariant: a torch network on batches of varying size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from transformers import AutoModelForCausalLM, AutoTokenizer

from reward_servers.deqa.formula import (
    LEVELS,
    Preprocessing,
    level_ids,
    level_probabilities,
    pixels,
    prompt_ids,
    quality,
)
from reward_servers.scorer import ItemScore, Scorer, ScorerOptions
from reward_servers.wire import Images, ScoreCall


class DeqaOptions(ScorerOptions):
    """Arguments of the DeQA scorer."""

    # `model` is told by its name: the scorer's `model`.
    neutral: ClassVar[frozenset[str]] = frozenset({"model", "device", "max_batch"})

    model: Path
    """Directory of the published repository: weights, tokenizer, preprocessor and code."""
    device: str = "cuda"
    """`cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of weights and activations. Published scores are float16's."""
    max_batch: int = Field(default=8, ge=1)
    """Images that go through the network at once."""
    divide_by: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """1 gives scores in 1..5; published reward servers divide by 5."""


class DeqaScorer(Scorer):
    name = "deqa"
    version = "1"
    batch_invariant = False

    def __init__(self, options: DeqaOptions) -> None:
        self.options = options
        self.max_batch = options.max_batch
        self.model = options.model.name
        self._divide_by = options.divide_by
        self._device = torch.device(options.device)
        self._dtype: torch.dtype = getattr(torch, options.dtype)
        self._how = Preprocessing.of(_json(options.model / "preprocessor_config.json"))
        # The slow tokenizer is the published one: the fast one may split otherwise beside the image.
        tokenizer = AutoTokenizer.from_pretrained(
            str(options.model), use_fast=False, local_files_only=True, trust_remote_code=False
        )

        def tokenize(text: str) -> list[int]:
            return list(tokenizer(text)["input_ids"])

        self._ids = torch.tensor([prompt_ids(tokenize, tokenizer.bos_token_id)], device=self._device)
        self._levels = torch.tensor(level_ids(tokenize, tokenizer.bos_token_id), device=self._device)
        self._network = self._load(options.model)

    def score(self, call: ScoreCall) -> Sequence[ItemScore]:
        probabilities = self.probabilities(call.images)
        return [
            self._item(score, row) for score, row in zip(quality(probabilities), probabilities, strict=True)
        ]

    def warm_up(self) -> None:
        self.probabilities([np.full((32, 32, 3), 127, np.uint8)])

    def probabilities(self, images: Images) -> NDArray[np.float64]:
        """(N, 5) probabilities of the levels, in the order of LEVELS, for at most `max_batch` images."""
        with torch.inference_mode():
            seen = torch.from_numpy(pixels(images, self._how)).to(self._device, self._dtype)
            ids = self._ids.repeat(len(images), 1)
            logits = self._network(input_ids=ids, images=seen)["logits"][:, -1, self._levels]
            return level_probabilities(logits.float().cpu().numpy())

    def _item(self, score: float, row: NDArray[np.float64]) -> ItemScore:
        if not np.isfinite(score):
            return ItemScore(None, error=f"the network's logits are not finite in {self._dtype}")
        return ItemScore(
            float(score) / self._divide_by, {"levels": dict(zip(LEVELS, row.tolist(), strict=True))}
        )

    def _load(self, directory: Path) -> Any:
        network, found = AutoModelForCausalLM.from_pretrained(
            str(directory),
            trust_remote_code=True,
            local_files_only=True,
            use_safetensors=True,
            # What the published code was written for: it knows no other attention.
            attn_implementation="eager",
            torch_dtype=self._dtype,
            output_loading_info=True,
        )
        weights = {name for name, _ in network.named_parameters()}
        if missing := sorted(weights & set(found["missing_keys"])):
            raise ValueError(f"{directory}: {len(missing)} weights are missing, such as {missing[0]}")
        return network.eval().requires_grad_(False).to(self._device)


def _json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected an object")
    return content
