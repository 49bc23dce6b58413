"""SANA: linear attention, latents 32 times smaller than the image, Gemma as text encoder.

Promises
- Velocities, latents and images equal those of the stock pipeline, called without resolution binning.
- A prompt is encoded with the pipeline's own instruction to Gemma before it; the negative one, as there,
  without.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from policy.base import Condition
from policy.loading import Configs, Geometry, Parts
from policy.pipeline_policy import CROSS_ATTENTION, PipelinePolicy
from services.config import ModelConfig, RolloutConfig

PIXEL_MULTIPLE = 32
"""The stock pipeline refuses other sizes."""


class SanaPolicy(PipelinePolicy):
    """SANA's transformer with Gemma 2 and a deep-compression autoencoder."""

    parts = Parts(
        pipeline="SanaPipeline",
        denoiser_class="SanaTransformer2DModel",
        vae_class="AutoencoderDC",
        encoders={"text_encoder": "Gemma2Model"},
        tokenizers=("tokenizer",),
    )
    lora_targets = CROSS_ATTENTION

    @classmethod
    def geometry(cls, configs: Configs) -> Geometry:
        return Geometry(
            channels=configs.denoiser["in_channels"],
            compression=2 ** (len(configs.vae["encoder_block_out_channels"]) - 1),
            patch=configs.denoiser["patch_size"],
            multiple=PIXEL_MULTIPLE,
        )

    @classmethod
    def _misfits(cls, config: ModelConfig, configs: Configs) -> Iterator[str]:
        yield from super()._misfits(config, configs)
        if configs.denoiser.get("guidance_embeds"):
            yield (
                "the transformer has guidance_embeds (SANA-Sprint), which a SanaPipeline cannot give it; "
                "valid are models without it, such as "
                "Efficient-Large-Model/Sana_1600M_512px_diffusers"
            )

    def call_arguments(self, rollout: RolloutConfig) -> dict[str, object]:
        return super().call_arguments(rollout) | {"use_resolution_binning": False}

    def negative(self) -> Condition:
        return self._kept(None, self._encode_negative)

    def _encode_negative(self) -> Condition:
        return self._encoded_by(None, lambda device: self._encoded("", device, instruction=None))

    @classmethod
    def condition_widths(cls, denoiser: Mapping[str, Any]) -> dict[str, int]:
        return {"prompt_embeds": denoiser["caption_channels"]}

    def random_condition(self, generator: torch.Generator) -> Condition:
        condition = super().random_condition(generator)
        return condition | {"mask": torch.ones(len(condition["prompt_embeds"]), dtype=torch.int64)}

    def _condition(self, prompt: str, device: torch.device) -> Condition:
        call = inspect.signature(type(self.pipeline).__call__)
        return self._encoded(prompt, device, call.parameters["complex_human_instruction"].default)

    def _encoded(self, prompt: str, device: torch.device, instruction: list[str] | None) -> Condition:
        prompt_embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            device=device,
            max_sequence_length=self.config.max_sequence_length,
            complex_human_instruction=instruction,
        )
        return {"prompt_embeds": prompt_embeds[0], "mask": mask[0]}

    def _predict(self, x: Tensor, timestep: Tensor, conditions: Sequence[Condition]) -> Tensor:
        samples = len(x)
        prediction: Tensor = self.transformer(
            x,
            encoder_hidden_states=self._spread(conditions, "prompt_embeds", samples),
            encoder_attention_mask=self._spread(conditions, "mask", samples, torch.int64),
            timestep=timestep * self._configs.denoiser.get("timestep_scale", 1.0),
            return_dict=False,
        )[0]
        # Where the transformer was made to say a variance too, its first half is the velocity.
        return prediction.float()[:, : x.shape[1]]

    def _unscaled(self, latents: Tensor) -> Tensor:
        unscaled: Tensor = latents / self.pipeline.vae.config.scaling_factor
        return unscaled


FAMILIES = (SanaPolicy,)
