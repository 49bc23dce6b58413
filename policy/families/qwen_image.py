"""Qwen-Image: packed latents, a vision-language model as text encoder, a video VAE used for one frame.

Promises
- Velocities, latents and images equal those of the stock pipeline; guidance too, which there keeps the norm
  of the conditional prediction in each token.
- Prompts of different lengths may share a forward pass: the shorter are filled up and masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from policy.base import Condition
from policy.loading import Configs, Geometry, Parts
from policy.packing import PATCH, pack, unpack
from policy.pipeline_policy import JOINT_ATTENTION, PipelinePolicy
from services.config import ModelConfig, RolloutConfig

NEGATIVE_PROMPT = " "
"""What the published examples guide away from."""
UNSUPPORTED = ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope", "zero_cond_t")
"""Settings of the transformer that the text-to-image pipeline does not serve."""


class QwenImagePolicy(PipelinePolicy):
    """Qwen-Image's MMDiT with Qwen2.5-VL and its VAE."""

    parts = Parts(
        pipeline="QwenImagePipeline",
        denoiser_class="QwenImageTransformer2DModel",
        vae_class="AutoencoderKLQwenImage",
        encoders={"text_encoder": "Qwen2_5_VLForConditionalGeneration"},
        tokenizers=("tokenizer",),
    )
    lora_targets = JOINT_ATTENTION
    # The pipeline passes a scheduler its sigmas, which of these only Euler's takes.
    solvers = ("euler", "sde")
    sigmas = "fractions"
    joint_guidance = False

    @classmethod
    def geometry(cls, configs: Configs) -> Geometry:
        return Geometry(
            channels=configs.denoiser["in_channels"] // PATCH**2,
            compression=2 ** len(configs.vae["temperal_downsample"]),
            patch=PATCH,
        )

    @classmethod
    def _vae_channels(cls, vae: Mapping[str, Any]) -> int:
        return int(vae["z_dim"])

    @classmethod
    def _misfits(cls, config: ModelConfig, configs: Configs) -> Iterator[str]:
        yield from super()._misfits(config, configs)
        for name in UNSUPPORTED:
            if configs.denoiser.get(name):
                yield (
                    f"the transformer has {name}, with which a QwenImagePipeline cannot call it; "
                    "valid are text-to-image models without it, such as Qwen/Qwen-Image"
                )

    def call_arguments(self, rollout: RolloutConfig) -> dict[str, object]:
        arguments = super().call_arguments(rollout)
        del arguments["guidance_scale"]
        arguments["true_cfg_scale"] = rollout.guidance
        if rollout.guidance > 1:
            arguments["negative_prompt"] = NEGATIVE_PROMPT
        return arguments

    def longest(self, condition: Condition) -> Condition:
        tokens, wanted = condition["prompt_embeds"], self.config.max_sequence_length
        return condition | {"prompt_embeds": tokens.repeat(-(-wanted // len(tokens)), 1)[:wanted]}

    def negative(self) -> Condition:
        return self.encode(NEGATIVE_PROMPT)

    @classmethod
    def condition_widths(cls, denoiser: Mapping[str, Any]) -> dict[str, int]:
        return {"prompt_embeds": denoiser["joint_attention_dim"]}

    def _condition(self, prompt: str, device: torch.device) -> Condition:
        prompt_embeds, _ = self.pipeline.encode_prompt(
            prompt=prompt, device=device, max_sequence_length=self.config.max_sequence_length
        )
        return {"prompt_embeds": prompt_embeds[0]}

    def _predict(self, x: Tensor, timestep: Tensor, conditions: Sequence[Condition]) -> Tensor:
        samples, height, width = len(x), x.shape[2], x.shape[3]
        embeds, mask = self._filled(conditions, samples)
        prediction: Tensor = self.transformer(
            hidden_states=pack(x),
            # As the stock pipeline has it in this dtype, also where x stays float32 under autocast.
            timestep=timestep.to(self._dtype) / 1000,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * samples,
            return_dict=False,
        )[0]
        return prediction

    def _filled(self, conditions: Sequence[Condition], samples: int) -> tuple[Tensor, Tensor | None]:
        """(N, L, D) text tokens, filled up with zeros to the longest, and (N, L) which are none of these."""
        tokens = [condition["prompt_embeds"].to(self.device, self._dtype) for condition in conditions]
        each = samples // len(conditions)
        embeds = pad_sequence(tokens, batch_first=True).repeat_interleave(each, dim=0)
        lengths = torch.tensor([len(one) for one in tokens], device=self.device).repeat_interleave(each)
        if len({len(one) for one in tokens}) == 1:
            return embeds, None
        given: Tensor = torch.arange(embeds.shape[1], device=self.device) < lengths[:, None]
        return embeds, given

    def _guided(self, away: Tensor, toward: Tensor, guidance: float) -> Tensor:
        combined = super()._guided(away, toward, guidance)
        wanted, found = toward.norm(dim=-1, keepdim=True), combined.norm(dim=-1, keepdim=True)
        kept: Tensor = combined * (wanted / found)
        return kept

    def _velocity(self, prediction: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        return unpack(prediction, x.shape[2], x.shape[3])

    def _unscaled(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae.config
        mean = torch.tensor(vae.latents_mean).view(1, -1, 1, 1, 1).to(latents)
        inverse = 1.0 / torch.tensor(vae.latents_std).view(1, -1, 1, 1, 1).to(latents)
        unscaled: Tensor = latents[:, :, None] / inverse + mean
        return unscaled

    def _pixels(self, latents: Tensor) -> Tensor:
        return super()._pixels(latents)[:, :, 0]


FAMILIES = (QwenImagePolicy,)
