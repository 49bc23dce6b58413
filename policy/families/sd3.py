"""Stable Diffusion 3 and 3.5, any size, dual attention layers or not.

Promises
- Conditions come from the pipeline's own `encode_prompt`, one prompt at a time.
- Latents, velocities (with guidance too) and images equal those of the stock pipeline bit for bit in float32
  (policy/base.py).
- Works for pipelines saved without T5 (its tokens are then zeros, as in the stock pipeline).
- Images that have more patches a side than the transformer has positions for are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from policy.base import Condition
from policy.loading import Configs, Geometry, Parts
from policy.pipeline_policy import JOINT_ATTENTION, PipelinePolicy
from services.config import ModelConfig


class StableDiffusion3Policy(PipelinePolicy):
    """SD3's MMDiT with its CLIP and T5 encoders and its VAE."""

    parts = Parts(
        pipeline="StableDiffusion3Pipeline",
        denoiser_class="SD3Transformer2DModel",
        vae_class="AutoencoderKL",
        encoders={
            "text_encoder": "CLIPTextModelWithProjection",
            "text_encoder_2": "CLIPTextModelWithProjection",
            "text_encoder_3": "T5EncoderModel",
        },
        tokenizers=("tokenizer", "tokenizer_2", "tokenizer_3"),
        optional=frozenset({"text_encoder_3", "tokenizer_3"}),
    )
    lora_targets = JOINT_ATTENTION

    @classmethod
    def geometry(cls, configs: Configs) -> Geometry:
        return Geometry(
            channels=configs.denoiser["in_channels"],
            compression=2 ** (len(configs.vae["block_out_channels"]) - 1),
            patch=configs.denoiser["patch_size"],
        )

    @classmethod
    def _misfits(cls, config: ModelConfig, configs: Configs) -> Iterator[str]:
        yield from super()._misfits(config, configs)
        geometry, positions = cls.geometry(configs), configs.denoiser.get("pos_embed_max_size")
        if positions is None:
            return
        largest = positions * geometry.patch * geometry.compression
        if max(config.height, config.width) > largest:
            yield (
                f"model.height {config.height} and model.width {config.width}: the transformer has positions "
                f"for sides of at most {largest} pixels (its pos_embed_max_size is {positions})"
            )

    @classmethod
    def condition_widths(cls, denoiser: Mapping[str, Any]) -> dict[str, int]:
        return {"prompt_embeds": denoiser["joint_attention_dim"], "pooled": denoiser["pooled_projection_dim"]}

    def _condition(self, prompt: str, device: torch.device) -> Condition:
        prompt_embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompt,
            prompt_2=None,
            prompt_3=None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
        )
        return {"prompt_embeds": prompt_embeds[0], "pooled": pooled[0]}

    def _predict(self, x: Tensor, timestep: Tensor, conditions: Sequence[Condition]) -> Tensor:
        prediction: Tensor = self.transformer(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=self._spread(conditions, "prompt_embeds", len(x)),
            pooled_projections=self._spread(conditions, "pooled", len(x)),
            return_dict=False,
        )[0]
        return prediction

    def _unscaled(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae.config
        unscaled: Tensor = latents / vae.scaling_factor + vae.shift_factor
        return unscaled


FAMILIES = (StableDiffusion3Policy,)
