"""What the families of diffusers pipelines share: loading, guidance, noise, decoding, text-encoder placement.

Promises
- The stock pipeline's parts are called as the pipeline calls them; what a family adds is how its denoiser is
  called (`_predict`), what its output means (`_velocity`) and how a prompt is encoded (`_condition`, see
  policy/text_encoders.py).
- A rollout that the stock pipeline of the family could not repeat is refused, with what would be valid.

policy/registry.py makes these; docs/models.md says how to add one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from policy.adapters import add_lora
from policy.base import Condition
from policy.compiling import compile_on_gpu
from policy.errors import PolicyError
from policy.loading import (
    Configs,
    Geometry,
    TextParts,
    check_index,
    check_numbers,
    empty_denoiser,
    find_device,
    load_pipeline,
    place,
    read_configs,
)
from policy.schedule import published_rollout
from policy.text_encoders import CachedConditions, PromptEncoding
from services.config import ModelConfig, RolloutConfig

JOINT_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
"""Attention projections of the transformers that attend to text and image at once; the paper's LoRA."""
CROSS_ATTENTION = tuple(
    f"{attention}.{projection}"
    for attention in ("attn1", "attn2")
    for projection in ("to_q", "to_k", "to_v", "to_out.0")
)
"""Of those that attend to the image, and then to the text."""
RANDOM_TOKENS = 16
"""Text tokens of a condition of no prompt."""


class PipelinePolicy(PromptEncoding):
    """A policy whose parts are those of a stock diffusers pipeline."""

    lora_targets: ClassVar[tuple[str, ...]]
    """What gets an adapter if the configuration does not say."""
    solvers: ClassVar[tuple[str, ...]] = ("dpmsolver++", "euler", "heun", "sde")
    """`rollout.solver` that the stock pipeline can step with."""
    sigmas: ClassVar[str] = "scheduler"
    """`rollout.sigmas` that the stock pipeline gives to Euler's solver."""
    joint_guidance: ClassVar[bool] = True
    """Whether both models of a guided prediction share one forward pass, as in the stock pipeline."""

    def __init__(
        self,
        config: ModelConfig,
        pipeline: Any,
        denoiser: nn.Module,
        configs: Configs,
        *,
        base: bool,
        cached: CachedConditions | None = None,
    ) -> None:
        super().__init__(config, pipeline, denoiser, base=base)
        self._cached = cached
        self._configs = configs
        self._latent_shape = self.geometry(configs).latent_shape(config)
        self._dtype: torch.dtype = getattr(torch, config.dtype)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        location: str,
        index: Mapping[str, Any],
        *,
        text_encoders: bool,
        vae: bool,
        base: bool,
        seed: int,
        to_shard: bool,
        condition_cache: Path | None,
    ) -> Self:
        """See policy/registry.py `load_policy`."""
        configs = cls.read_configs(config, location, index, text_encoders=text_encoders)
        text: TextParts = "all" if condition_cache is None else "tokenizers"
        pipeline = load_pipeline(
            *(cls.parts, config, location, index), text_encoders=text if text_encoders else "none", vae=vae
        )
        policy = cls.around(pipeline, config, configs, base=base, seed=seed, to_shard=to_shard)
        # Behind the move to the device, where it costs least.
        check_numbers(pipeline, cls.parts, location)
        if text_encoders and condition_cache is not None:
            policy._cached = CachedConditions(condition_cache, pipeline, cls.parts, config, location, index)
        return policy

    @classmethod
    def around(
        cls,
        pipeline: Any,
        config: ModelConfig,
        configs: Configs,
        *,
        base: bool = True,
        seed: int = 0,
        to_shard: bool = False,
    ) -> Self:
        """A policy of a stock pipeline that is in memory, in the dtype of the configuration.

        The pipeline is the policy's from here on: it gets the adapters, and is moved to the device, but for
        a denoiser that is to be sharded.
        """
        denoiser: Any = getattr(pipeline, cls.parts.denoiser)
        if config.train == "lora":
            add_lora(denoiser, config.lora, seed=seed, targets=config.lora.targets or cls.lora_targets)
        else:
            denoiser.float().requires_grad_(True)
        # The VAE's flags stay as they are: on CPUs they choose the convolution kernel, even under no_grad,
        # and with another one the images would differ from the stock pipeline's in the last bit.
        for name in cls.parts.encoders:
            if getattr(pipeline, name) is not None:
                getattr(pipeline, name).requires_grad_(False)
        place(pipeline, cls.parts, config, denoiser=not to_shard)
        denoiser.eval()
        policy = cls(config, pipeline, denoiser, configs, base=base)
        if config.compile:
            compile_on_gpu(denoiser, policy.device)
        return policy

    @classmethod
    def load_encoders(
        cls, config: ModelConfig, location: str, index: Mapping[str, Any], condition_cache: Path
    ) -> Self:
        """A policy that does nothing but encode into the cache: neither denoiser nor VAE is loaded."""
        configs = cls.read_configs(config, location, index, text_encoders=True)
        pipeline = load_pipeline(
            *(cls.parts, config, location, index), text_encoders="tokenizers", vae=False, denoiser=False
        )
        denoiser = empty_denoiser(cls.parts, configs)
        # Encoding asks it for a width.
        setattr(pipeline, cls.parts.denoiser, denoiser)
        cached = CachedConditions(condition_cache, pipeline, cls.parts, config, location, index)
        policy = cls(config, pipeline, denoiser, configs, base=False, cached=cached)
        policy.device = find_device(config.device)
        return policy

    @classmethod
    def read_configs(
        cls, config: ModelConfig, location: str, index: Mapping[str, Any], *, text_encoders: bool
    ) -> Configs:
        """The configurations of the components, once they are known to fit each other and the image size.

        Raises:
            PolicyError: they do not.
        """
        check_index(cls.parts, location, index, text_encoders=text_encoders)
        configs = read_configs(cls.parts, config, location)
        for problem in cls._misfits(config, configs):
            raise PolicyError(f"model.path {location}: {problem}")
        cls.geometry(configs).latent_shape(config)
        return configs

    @classmethod
    @abstractmethod
    def geometry(cls, configs: Configs) -> Geometry:
        """Latents and tokens of an image."""

    @classmethod
    def stock_rollout(cls, config: ModelConfig, configs: Configs) -> dict[str, object]:
        """The keys of the `rollout` section with which rollouts step as the published scheduler does.

        Raises:
            PolicyError: the published scheduler steps as no rollout can.
        """
        tokens = cls.geometry(configs).tokens(config)
        return published_rollout(configs.scheduler, sigmas=cls.sigmas, tokens=tokens)

    @classmethod
    def _misfits(cls, config: ModelConfig, configs: Configs) -> Iterator[str]:
        """What is wrong with the components, each with what would be valid."""
        channels, found = cls.geometry(configs).channels, cls._vae_channels(configs.vae)
        if channels != found:
            yield (
                f"the {cls.parts.denoiser} takes latents of {channels} channels, the VAE has {found}; "
                "both must come from one model"
            )
        if config.embedded_guidance is not None and not configs.denoiser.get("guidance_embeds"):
            yield (
                "model.embedded_guidance would do nothing: this model is not guidance-distilled "
                f"(guidance_embeds of its {cls.parts.denoiser}); leave it out, and use rollout.guidance"
            )

    @classmethod
    def _vae_channels(cls, vae: Mapping[str, Any]) -> int:
        return int(vae["latent_channels"])

    @abstractmethod
    def _predict(self, x: Tensor, timestep: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """What the denoiser says, as the stock pipeline calls it.

        Args:
            x: (N, C, h, w) noisy latents in the dtype of the denoiser's input.
            timestep: (N,) of the solver, sigma * 1000.
            conditions: each shared by equally many consecutive samples.
        """

    def _velocity(self, prediction: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        """(N, C, h, w) velocity that a prediction at x, float32, means."""
        return prediction

    def _guided(self, away: Tensor, toward: Tensor, guidance: float) -> Tensor:
        """A prediction away from one, toward another."""
        return away + guidance * (toward - away)

    @abstractmethod
    def _unscaled(self, latents: Tensor) -> Tensor:
        """Latents as the VAE takes them."""

    def _pixels(self, latents: Tensor) -> Tensor:
        """(N, 3, H, W) what the VAE decodes, in -1 to 1."""
        decoded: Tensor = self.pipeline.vae.decode(latents, return_dict=False)[0]
        return decoded

    def call_arguments(self, rollout: RolloutConfig) -> dict[str, object]:
        """How the stock pipeline is called, beside prompt and generators, to draw what a rollout draws."""
        return {
            "height": self.config.height,
            "width": self.config.width,
            "num_inference_steps": rollout.steps,
            "guidance_scale": rollout.guidance,
            "max_sequence_length": self.config.max_sequence_length,
        }

    @classmethod
    def check_rollout(cls, rollout: RolloutConfig) -> None:
        name = cls.parts.pipeline
        if rollout.solver not in cls.solvers:
            raise PolicyError(
                f"rollout.solver {rollout.solver!r}: a stock {name} cannot step with it; "
                f"valid: {', '.join(cls.solvers)}"
            )
        sigmas = cls.sigmas if rollout.solver in ("euler", "sde") else "scheduler"
        if rollout.sigmas != sigmas:
            raise PolicyError(
                f"rollout.sigmas {rollout.sigmas!r}: a stock {name} with solver {rollout.solver!r} takes the "
                f"steps that {sigmas!r} stands for; set rollout.sigmas to {sigmas}"
            )

    def latent_shape(self) -> tuple[int, int, int]:
        return self._latent_shape

    def random_condition(self, generator: torch.Generator) -> Condition:
        widths = self.condition_widths(self._configs.denoiser)
        return {
            name: torch.randn((width,) if name == "pooled" else (RANDOM_TOKENS, width), generator=generator)
            for name, width in widths.items()
        }

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
        if x.shape[1:] != self._latent_shape:
            raise ValueError(
                f"latents are {tuple(x.shape)}, expected (N, *{self._latent_shape}) for images of "
                f"{self.config.height} x {self.config.width}"
            )
        conditions = [condition] if isinstance(condition, Mapping) else list(condition)
        self._check_conditions(conditions if negative is None else [*conditions, negative])
        if samples % len(conditions):
            raise ValueError(
                f"{len(conditions)} conditions for {samples} samples: each must serve equally many samples"
            )
        times = timestep.to(self.device).expand(samples)
        lowered = self.config.train == "full" and self._dtype != torch.float32
        given = x if lowered else x.to(self._dtype)
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=lowered):
            if guidance <= 1:
                prediction = self._predict(given, times, conditions)
            elif negative is None:
                raise ValueError(
                    f"guidance {guidance} needs a negative condition: pass negative=policy.negative()"
                )
            elif self.joint_guidance:
                both = [*([negative] * len(conditions)), *conditions]
                joint = self._predict(torch.cat([given, given]), times.repeat(2), both)
                prediction = self._guided(joint[:samples], joint[samples:], guidance)
            else:
                toward = self._predict(given, times, conditions)
                away = self._predict(given, times, [negative])
                prediction = self._guided(away, toward, guidance)
        return self._velocity(prediction.float(), x, times).float()

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int) -> NDArray[np.uint8]:
        if self.pipeline.vae is None:
            raise PolicyError("the VAE is not loaded: load the policy with vae=True")
        images = []
        for part in latents.to(device=self.device, dtype=self._dtype).split(batch):  # type: ignore[no-untyped-call]
            decoded = self._pixels(self._unscaled(part))
            unit = (decoded * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
            # To the host as bytes: a thread of it takes longer for floats than a GPU for all of decoding.
            images.append((unit * 255).round().to(torch.uint8).cpu())
        pixels: NDArray[np.uint8] = torch.cat(images).numpy()
        return pixels

    def _spread(
        self, conditions: Sequence[Condition], name: str, samples: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """(N, ...) one tensor of the conditions, each repeated for its samples, in the denoiser's dtype."""
        stacked = torch.stack([condition[name].to(self.device) for condition in conditions])
        return stacked.repeat_interleave(samples // len(conditions), dim=0).to(dtype or self._dtype)
