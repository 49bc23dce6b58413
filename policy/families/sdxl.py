"""Stable Diffusion XL: a U-Net that predicts the noise (epsilon) of a variance-preserving (VP) process, told
to the rest of the project as the velocity of a flow.

The process in its variance-exploding form is x_ve = x0 + sigma_ve noise, with sigma_ve =
sqrt((1 - alpha_bar) / alpha_bar). Divided by 1 + sigma_ve it is a flow at noise level sigma:

    sigma = sigma_ve / (1 + sigma_ve)       x = x_ve / (1 + sigma_ve) = (1 - sigma) x0 + sigma noise

so every x0 and noise has the same points in all three forms, only scaled. The U-Net takes the VP form
x_vp = x / sqrt(sigma^2 + (1 - sigma)^2) and the whole timestep t of sigma_ve(t). From its epsilon follow the
x0 that it means, (x - sigma epsilon) / (1 - sigma), and the velocity

    v = epsilon - x0 = (epsilon - x) / (1 - sigma)

exactly. A step of Euler in v from sigma to sigma' is the stock EulerDiscreteScheduler's step in x_ve (and
DDIM's in x_vp), scaled.

The error that DGPO compares: for x made of x0 and noise, the DSM error of the velocity is

    mean((noise - x0 - v)^2) = (1 + sigma_ve)^2 mean((noise - epsilon)^2) = error of epsilon / (1 - sigma)^2

The paper's models predict velocities: weight 1. Told in this model's own parametrisation, the error of
epsilon, the same objective has at each timestep the weight (1 + sigma_ve)^2 (`epsilon_weight`), from 1.06 at
the cleanest of the 1000 timesteps to 243 at the noisiest. An objective on errors of epsilon with a constant
beta (Diffusion-DPO) would have that beta where this one has beta * (1 + sigma_ve)^2: choose beta and the clip
range for the velocity error, or train on a narrow window of timesteps, where the weight hardly changes.

Promises
- Rollouts with `rollout.sigmas: vp` equal the stock pipeline's to rounding.
- A noise level that the U-Net was not trained on is refused, not extrapolated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policy.base import Condition
from policy.errors import PolicyError
from policy.loading import Configs, Geometry, Parts
from policy.pipeline_policy import CROSS_ATTENTION, PipelinePolicy
from policy.schedule import VP_SETTINGS
from services.config import ModelConfig, RolloutConfig

PIXEL_MULTIPLE = 8
"""The stock pipeline refuses other sizes."""
SIZES = 6
"""Height and width of the original, of the corner of the crop, and of the target."""
WHOLE = 0.01
"""A timestep this near a whole one is it: noise levels come in float32."""
FIXED = {key: VP_SETTINGS[key] for key in ("beta_start", "beta_end", "beta_schedule")}
"""Of the scheduler: what the noise levels follow from."""


class StableDiffusionXLPolicy(PipelinePolicy):
    """SDXL's U-Net with its two CLIP encoders and its VAE; it is asked for uncropped images at their size."""

    parts = Parts(
        pipeline="StableDiffusionXLPipeline",
        denoiser="unet",
        denoiser_class="UNet2DConditionModel",
        vae_class="AutoencoderKL",
        encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
        tokenizers=("tokenizer", "tokenizer_2"),
    )
    lora_targets = CROSS_ATTENTION
    solvers = ("euler", "sde")
    sigmas = "vp"

    @classmethod
    def geometry(cls, configs: Configs) -> Geometry:
        return Geometry(
            channels=configs.denoiser["in_channels"],
            compression=2 ** (len(configs.vae["block_out_channels"]) - 1),
            multiple=PIXEL_MULTIPLE,
        )

    @classmethod
    def _misfits(cls, config: ModelConfig, configs: Configs) -> Iterator[str]:
        yield from super()._misfits(config, configs)
        predicts = configs.scheduler.get("prediction_type", "epsilon")
        if predicts != "epsilon":
            yield f"its scheduler says prediction_type {predicts!r}; valid are models that predict 'epsilon'"
        for name, wanted in FIXED.items():
            found = configs.scheduler.get(name)
            if found != wanted:
                yield f"its scheduler has {name} {found!r}; SDXL's noise schedule has {wanted!r}"
        if configs.scheduler.get("rescale_betas_zero_snr"):
            yield "its scheduler has rescale_betas_zero_snr; valid are models trained without it"
        if configs.denoiser.get("addition_embed_type") != "text_time":
            yield (
                "the unet is not SDXL's: its addition_embed_type is "
                f"{configs.denoiser.get('addition_embed_type')!r}, valid is 'text_time'"
            )
        if configs.denoiser.get("time_cond_proj_dim") is not None:
            yield "the unet is guidance-distilled (time_cond_proj_dim, an LCM); valid are models that are not"

    @classmethod
    def stock_rollout(cls, config: ModelConfig, configs: Configs) -> dict[str, object]:
        return {"solver": "euler", "sigmas": cls.sigmas, "shift": 1.0}

    def call_arguments(self, rollout: RolloutConfig) -> dict[str, object]:
        arguments = super().call_arguments(rollout)
        del arguments["max_sequence_length"]
        return arguments

    def negative(self) -> Condition:
        empty = self.encode("")
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return empty
        return {name: torch.zeros_like(tensor) for name, tensor in empty.items()}

    @classmethod
    def condition_widths(cls, denoiser: Mapping[str, Any]) -> dict[str, int]:
        # What is added to the time embedding: six sizes, and the pooled text.
        sizes = SIZES * denoiser["addition_time_embed_dim"]
        pooled = denoiser["projection_class_embeddings_input_dim"] - sizes
        return {"prompt_embeds": denoiser["cross_attention_dim"], "pooled": pooled}

    def _condition(self, prompt: str, device: torch.device) -> Condition:
        prompt_embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompt, device=device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": prompt_embeds[0], "pooled": pooled[0]}

    def _predict(self, x: Tensor, timestep: Tensor, conditions: Sequence[Condition]) -> Tensor:
        samples, sigma = len(x), _column(timestep)
        height, width = self.config.height, self.config.width
        # Original size, corner of the crop, target size.
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=self._dtype, device=self.device)
        prediction: Tensor = self.transformer(
            (x / (sigma.square() + (1 - sigma).square()).sqrt()).to(x.dtype),
            vp_timestep(timestep),
            encoder_hidden_states=self._spread(conditions, "prompt_embeds", samples),
            added_cond_kwargs={
                "text_embeds": self._spread(conditions, "pooled", samples),
                "time_ids": sizes.repeat(samples, 1),
            },
            return_dict=False,
        )[0]
        return prediction

    def _velocity(self, prediction: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        return (prediction - x) / (1 - _column(timestep))

    def _unscaled(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae.config
        mean, deviation = getattr(vae, "latents_mean", None), getattr(vae, "latents_std", None)
        if mean is None or deviation is None:
            unscaled: Tensor = latents / vae.scaling_factor
            return unscaled
        spread, centre = (torch.tensor(of).view(1, -1, 1, 1).to(latents) for of in (deviation, mean))
        spread_out: Tensor = latents * spread / vae.scaling_factor + centre
        return spread_out


def epsilon_weight(sigma: Tensor) -> Tensor:
    """What the error of epsilon is multiplied with to be the DSM error of the velocity, (1 + sigma_ve)^2.

    Args:
        sigma: noise levels of the flow, in (0, 1).
    """
    return (1 - sigma).square().reciprocal()


def vp_timestep(timestep: Tensor) -> Tensor:
    """The U-Net's timesteps, 0 to 999, of the flow's, sigma * 1000.

    Raises:
        PolicyError: one is beyond the noise levels of the VP process.
    """
    levels = vp_sigmas()
    sigma = timestep.detach().to("cpu", torch.float64).numpy() / 1000
    # A step's first level may lie a rounding error beside the last of them.
    if sigma.min() < levels[0] * (1 - 1e-5) or sigma.max() > levels[-1] * (1 + 1e-5):
        raise PolicyError(
            f"SDXL has noise levels sigma from {levels[0]:.4f} to {levels[-1]:.4f}, found {sigma.min():.4f} "
            f"to {sigma.max():.4f}; set rollout.sigmas to vp, rollout.solver to euler and rollout.shift to 1"
        )
    whole = levels / (1 - levels)
    times = np.interp(sigma / (1 - sigma), whole, np.arange(len(whole)))
    near = np.abs(times - times.round()) < WHOLE
    return torch.from_numpy(np.where(near, times.round(), times)).to(timestep)


@cache
def vp_sigmas() -> NDArray[np.float64]:
    """(1000,) noise levels of the flow at SDXL's timesteps, rising."""
    low, high, steps = (VP_SETTINGS[key] for key in ("beta_start", "beta_end", "num_train_timesteps"))
    alpha_bar = np.cumprod(1 - np.linspace(low**0.5, high**0.5, steps, dtype=np.float64) ** 2)
    sigma_ve = np.sqrt((1 - alpha_bar) / alpha_bar)
    levels: NDArray[np.float64] = sigma_ve / (1 + sigma_ve)
    return levels


def _column(timestep: Tensor) -> Tensor:
    """(N,) timesteps to (N, 1, 1, 1) noise levels."""
    return (timestep / 1000).view(-1, 1, 1, 1)


FAMILIES = (StableDiffusionXLPolicy,)
