"""A policy small enough to differentiate by hand in float64, and groups and configs to train it with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from learner.objectives.base import LiveGroup, TrainingGroup
from policy.base import Condition, Policy
from services.config import Config, ModelConfig

SHAPE = (2, 3, 4)


class ToyTransformer(nn.Module):
    """v = B tanh(A x + time t + text c): nonlinear in x, t and c, with four parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(5, 2))
        self.outer = nn.Parameter(torch.randn(2, 5))
        self.time = nn.Parameter(torch.randn(5))
        self.text = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        bias = self.time * timestep / 1000 + text @ self.text.T
        hidden = torch.einsum("kc,nchw->nkhw", self.inner, x) + bias[..., None, None]
        return torch.einsum("ck,nkhw->nchw", self.outer, hidden.tanh())


class ToyPolicy(Policy):
    """Counts its forwards, in samples."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        torch.manual_seed(seed)
        network = ToyTransformer().to(dtype)
        super().__init__(ModelConfig(path="toy", train="full", device="cpu"), None, network, base=True)
        self.forwards = 0

    def latent_shape(self) -> tuple[int, int, int]:
        return SHAPE

    def velocity(
        self,
        x: Tensor,
        timestep: Tensor,
        condition: Condition | Sequence[Condition],
        *,
        guidance: float = 1.0,
        negative: Condition | None = None,
    ) -> Tensor:
        self.forwards += len(x)
        given = [condition] if isinstance(condition, Mapping) else list(condition)
        text = torch.stack([one["text"] for one in given]).repeat_interleave(len(x) // len(given), 0).to(x)
        toward: Tensor = self.transformer(x, timestep, text)
        if guidance == 1:
            return toward
        assert negative is not None
        away: Tensor = self.transformer(x, timestep, negative["text"].to(x).expand_as(text))
        return away + guidance * (toward - away)

    def _encode(self, prompt: str) -> Condition:
        generator = torch.Generator().manual_seed(len(prompt))
        return {"text": torch.randn(3, generator=generator)}

    def random_condition(self, generator: torch.Generator) -> Condition:
        return {"text": torch.randn(3, generator=generator)}

    def initial_latents(self, seeds: Sequence[int]) -> Tensor:
        raise AssertionError("an update never samples: this belongs to rollout workers")

    def decode(self, latents: Tensor, batch: int) -> NDArray[np.uint8]:
        raise AssertionError("an update never decodes: the learner holds no VAE")

    def moved(self, scale: float = 0.3, seed: int = 1) -> dict[str, Tensor]:
        """The trained tensors plus some noise."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: tensor + scale * torch.randn(tensor.shape, generator=generator).to(tensor)
            for name, tensor in self.tensors().items()
        }


def toy_config(**sections: Any) -> Config:
    """G 4, 2 groups a step, 4 solver steps of which 2 of the first 3 are trained."""
    raw: dict[str, Any] = {
        "model": {"path": "toy"},
        "prompts": {"source": "words"},
        "rollout": {"group_size": 4, "steps": 4},
        "rewards": [{"name": "ocr", "app": "ocr"}],
        "objective": {"beta": 5.0, "clip_range": None, "timesteps": {"first": 3, "per_update": 2}},
        "learner": {"groups_per_step": 2, "micro_batch": 8, "learning_rate": 0.01},
    }
    for name, values in sections.items():
        raw[name] = raw[name] | values if isinstance(values, dict) and name in raw else values
    return Config.model_validate(raw)


def training_groups(count: int = 2, seed: int = 0, size: int = 4) -> list[TrainingGroup]:
    generator = torch.Generator().manual_seed(seed)
    return [
        TrainingGroup(
            ordinal=10 + place,
            latents=torch.randn((size, *SHAPE), generator=generator),
            rewards={"ocr": torch.rand(size, generator=generator).tolist()},
            condition={"text": torch.randn(3, generator=generator)},
        )
        for place in range(count)
    ]


def live_groups(count: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[LiveGroup]:
    generator = torch.Generator().manual_seed(100 + seed)
    live = []
    for group in training_groups(count, seed):
        advantages = torch.randn(len(group.latents), generator=generator).to(dtype)
        live.append(
            LiveGroup(
                ordinal=group.ordinal,
                latents=group.latents.to(dtype),
                advantages=advantages - advantages.mean(),
                condition=group.condition,
            )
        )
    return live
