"""Stable Diffusion 3 and 3.5, any size: the stock pipeline's parts, called as the pipeline calls them.

Promises
- Conditions come from the pipeline's own `encode_prompt`, one prompt at a time.
- Latents, velocities (with guidance too) and images equal those of the stock pipeline bit for bit in float32.
- Works for pipelines saved without T5 (its tokens are then zeros, as in the stock pipeline).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policy.adapters import add_lora
from policy.base import Condition, Policy
from policy.errors import PolicyError
from services.config import ModelConfig

TEXT_COMPONENTS = (
    *("text_encoder", "text_encoder_2", "text_encoder_3"),
    *("tokenizer", "tokenizer_2", "tokenizer_3"),
)
OPTIONAL = ("text_encoder_3", "tokenizer_3")


class StableDiffusion3Policy(Policy):
    """SD3's MMDiT with its CLIP and T5 encoders and its VAE."""

    def __init__(
        self, config: ModelConfig, pipeline: Any, vae_config: Mapping[str, Any], *, base: bool
    ) -> None:
        super().__init__(config, pipeline, pipeline.transformer, base=base)
        factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
        multiple = factor * pipeline.transformer.config.patch_size
        if config.height % multiple or config.width % multiple:
            raise PolicyError(
                f"model.height {config.height} and model.width {config.width} must be multiples of {multiple}"
            )
        channels = int(pipeline.transformer.config.in_channels)
        self._latent_shape = (channels, config.height // factor, config.width // factor)
        self._dtype = getattr(torch, config.dtype)

    def latent_shape(self) -> tuple[int, int, int]:
        return self._latent_shape

    # no_grad and not inference_mode: the learner trains on these tensors.
    @torch.no_grad()
    def _encode(self, prompt: str) -> Condition:
        if self.pipeline.text_encoder is None:
            raise PolicyError("the text encoders are not loaded: load the policy with text_encoders=True")
        # The length is the configuration's choice, so what it truncates is no news, once a prompt.
        with _quiet():
            prompt_embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=prompt,
                prompt_2=None,
                prompt_3=None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.config.max_sequence_length,
            )
        return {"prompt_embeds": prompt_embeds[0], "pooled": pooled[0]}

    def initial_latents(self, seeds: Sequence[int]) -> Tensor:
        noise = [
            torch.randn(
                (1, *self._latent_shape), generator=torch.Generator().manual_seed(seed), dtype=self._dtype
            )
            for seed in seeds
        ]
        return torch.cat(noise).to(device=self.device, dtype=torch.float32)

    def velocity(
        self,
        x: Tensor,
        timestep: Tensor,
        condition: Condition | Sequence[Condition],
        *,
        guidance: float = 1.0,
        negative: Condition | None = None,
    ) -> Tensor:
        samples = len(x)
        given = [condition] if isinstance(condition, Mapping) else list(condition)
        embeds, pooled = self._spread(given, "prompt_embeds", samples), self._spread(given, "pooled", samples)
        if guidance > 1:
            if negative is None:
                raise ValueError(
                    f"guidance {guidance} needs a negative condition: pass negative=policy.negative()"
                )
            x = torch.cat([x, x])
            embeds = torch.cat([self._spread([negative], "prompt_embeds", samples), embeds])
            pooled = torch.cat([self._spread([negative], "pooled", samples), pooled])
        timestep = timestep.to(self.device).expand(samples).repeat(len(x) // samples)
        lowered = self.config.train == "full" and self._dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=lowered):
            velocity: Tensor = self.transformer(
                hidden_states=x if lowered else x.to(self._dtype),
                timestep=timestep,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        if guidance > 1:
            away, toward = velocity.chunk(2)
            velocity = away + guidance * (toward - away)
        return velocity.float()

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int) -> NDArray[np.uint8]:
        vae = self.pipeline.vae
        if vae is None:
            raise PolicyError("the VAE is not loaded: load the policy with vae=True")
        images = []
        for part in latents.to(device=self.device, dtype=self._dtype).split(batch):  # type: ignore[no-untyped-call]
            decoded = vae.decode(
                part / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False
            )[0]
            unit = (decoded * 0.5 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float()
            images.append((unit * 255).round().to(torch.uint8))
        pixels: NDArray[np.uint8] = torch.cat(images).numpy()
        return pixels

    def _spread(self, conditions: Sequence[Condition], name: str, samples: int) -> Tensor:
        if samples % len(conditions):
            raise ValueError(
                f"{len(conditions)} conditions for {samples} samples: each must serve equally many samples"
            )
        stacked = torch.stack([condition[name].to(self.device) for condition in conditions])
        return stacked.repeat_interleave(samples // len(conditions), dim=0).to(self._dtype)


def load(
    config: ModelConfig,
    location: str,
    index: Mapping[str, Any],
    *,
    text_encoders: bool,
    vae: bool,
    base: bool,
    seed: int,
) -> StableDiffusion3Policy:
    """See policy/registry.py `load_policy`."""
    import diffusers

    transformer_class = (index.get("transformer") or [None, None])[1]
    if transformer_class != "SD3Transformer2DModel":
        raise PolicyError(
            f"model.path {location}: the transformer of a StableDiffusion3Pipeline must be an "
            f"SD3Transformer2DModel, found {transformer_class}"
        )
    absent: dict[str, None] = {name: None for name in OPTIONAL if (index.get(name) or [None])[0] is None}
    if not text_encoders:
        absent |= dict.fromkeys(TEXT_COMPONENTS)
    if not vae:
        absent["vae"] = None
    dtype = getattr(torch, config.dtype)
    pipeline_class: Any = diffusers.StableDiffusion3Pipeline
    try:
        vae_config = diffusers.AutoencoderKL.load_config(location, subfolder="vae", revision=config.revision)
        with _quiet():
            pipeline = pipeline_class.from_pretrained(
                location, revision=config.revision, dtype=dtype, **absent
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise PolicyError(f"model.path {location}: cannot be loaded: {error}") from error
    transformer = pipeline.transformer
    if config.train == "lora":
        add_lora(transformer, config.lora, seed=seed)
    else:
        transformer.float().requires_grad_(True)
    # The VAE's flags stay as they are: on CPUs they choose the convolution kernel, even under no_grad, and
    # with another one the images would differ from the stock pipeline's in the last bit.
    for name in TEXT_COMPONENTS[:3]:
        if getattr(pipeline, name) is not None:
            getattr(pipeline, name).requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(_device(config.device))
    transformer.eval()
    return StableDiffusion3Policy(config, pipeline, vae_config, base=base)


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors only, and no progress bars, from diffusers and transformers; their settings are put back."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PolicyError(f"model.device {name!r}: not a device; valid: auto, cpu, cuda, cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PolicyError(f"model.device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


FAMILIES = {"StableDiffusion3Pipeline": load}
