"""FLUX.1-dev and what has its architecture (FLUX.1-schnell too): packed latents, embedded guidance.

Promises
- Velocities, latents and images equal those of the stock pipeline.
- Embedded guidance is a property of the model (`model.embedded_guidance`): rollouts, training, reference and
  base have the same. `rollout.guidance` above 1 is true classifier-free guidance away from the empty prompt,
  two forward passes, as `true_cfg_scale` of the stock pipeline; it is off by default there and here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from policy.base import Condition
from policy.loading import Configs, Geometry, Parts
from policy.packing import PATCH, pack, unpack
from policy.pipeline_policy import JOINT_ATTENTION, PipelinePolicy
from services.config import RolloutConfig

DEFAULT_GUIDANCE = 3.5
"""What FLUX.1-dev is told by default."""
ROTARY_AXES = 3
"""A token's place is its number, row and column; text is at (0, 0, 0)."""


class FluxPolicy(PipelinePolicy):
    """FLUX's transformer, with CLIP for the pooled text, T5 for its tokens, and a VAE of 16 channels."""

    parts = Parts(
        pipeline="FluxPipeline",
        denoiser_class="FluxTransformer2DModel",
        vae_class="AutoencoderKL",
        encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
        tokenizers=("tokenizer", "tokenizer_2"),
    )
    lora_targets = JOINT_ATTENTION
    # The pipeline passes a scheduler the sigmas or the shift that its image size has, and only one of these
    # takes them as they are.
    solvers = ("euler", "sde")
    sigmas = "fractions"
    joint_guidance = False

    @classmethod
    def geometry(cls, configs: Configs) -> Geometry:
        return Geometry(
            channels=configs.denoiser["in_channels"] // PATCH**2,
            compression=2 ** (len(configs.vae["block_out_channels"]) - 1),
            patch=PATCH,
        )

    def call_arguments(self, rollout: RolloutConfig) -> dict[str, object]:
        arguments = super().call_arguments(rollout)
        del arguments["guidance_scale"]
        if self._embedded is not None:
            arguments["guidance_scale"] = self._embedded
        if rollout.guidance > 1:
            arguments |= {"true_cfg_scale": rollout.guidance, "negative_prompt": ""}
        return arguments

    @property
    def _embedded(self) -> float | None:
        """Guidance that the model is told; None: it takes none."""
        if not self._configs.denoiser.get("guidance_embeds"):
            return None
        return self.config.embedded_guidance or DEFAULT_GUIDANCE

    @classmethod
    def condition_widths(cls, denoiser: Mapping[str, Any]) -> dict[str, int]:
        return {"prompt_embeds": denoiser["joint_attention_dim"], "pooled": denoiser["pooled_projection_dim"]}

    def _condition(self, prompt: str, device: torch.device) -> Condition:
        prompt_embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompt, device=device, max_sequence_length=self.config.max_sequence_length
        )
        return {"prompt_embeds": prompt_embeds[0], "pooled": pooled[0]}

    def _predict(self, x: Tensor, timestep: Tensor, conditions: Sequence[Condition]) -> Tensor:
        samples, height, width = len(x), x.shape[2], x.shape[3]
        embeds = self._spread(conditions, "prompt_embeds", samples)
        place: Tensor = self.pipeline._prepare_latent_image_ids(
            samples, height // PATCH, width // PATCH, self.device, self._dtype
        )
        guidance = None if self._embedded is None else torch.full([samples], self._embedded)
        prediction: Tensor = self.transformer(
            hidden_states=pack(x),
            # As the stock pipeline has it in this dtype, also where x stays float32 under autocast.
            timestep=timestep.to(self._dtype) / 1000,
            guidance=None if guidance is None else guidance.to(self.device),
            pooled_projections=self._spread(conditions, "pooled", samples),
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], ROTARY_AXES, device=self.device, dtype=self._dtype),
            img_ids=place,
            return_dict=False,
        )[0]
        return prediction

    def _velocity(self, prediction: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        return unpack(prediction, x.shape[2], x.shape[3])

    def _unscaled(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae.config
        unscaled: Tensor = latents / vae.scaling_factor + vae.shift_factor
        return unscaled


FAMILIES = (FluxPolicy,)
