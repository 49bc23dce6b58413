"""The architectures of models without their weights, and what a pass costs.

Promises
- Sizes are those of the published configurations (published_models.json beside this file), or of the
  configurations of a pipeline that lies in a local directory. No weights are read, no hub is asked.
- FLOPs, parameters and activations are counted on the meta device: no memory, no GPU, any machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from policy.adapters import add_lora
from policy.loading import quiet
from policy.pipeline_policy import PipelinePolicy
from policy.registry import supported
from services.config import Config, DgpoConfig, LoraConfig
from services.config_file import ConfigError

MODELS: dict[str, Any] = json.loads((Path(__file__).parent / "published_models.json").read_text())
COMPRESSION = 8
"""Pixels of a side that are one latent, of every published model in the file."""
PACKED = ("FluxTransformer2DModel", "QwenImageTransformer2DModel")
"""Denoisers whose input channels are patches of 2 x 2 latents."""
GIB = 1024**3


@dataclass(frozen=True)
class Published:
    """A model of the file."""

    name: str
    hub: str
    denoiser: str
    """Class in diffusers."""
    config: dict[str, Any]
    text_tokens: int
    """Of a condition; of Qwen-Image, whose conditions are as long as their prompts, of a usual prompt."""
    text_billions: float
    """Parameters of its text encoders."""
    text_encoders: list[dict[str, Any]] | None = None
    """Of those that are timed: `encoder`, a class in transformers, its `config`, and `tokens` of a prompt."""
    vae: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    """Where the shift follows from the size of the image."""
    compression: int | None = None
    """Pixels of a side that are one latent; None: what the VAE says, or `COMPRESSION`."""

    @classmethod
    def named(cls, name: str) -> Published:
        return cls(name=name, **MODELS[name])

    def make(self) -> Any:
        """The denoiser with random weights, on torch's default device and in its default dtype."""
        return self.denoiser_class(**self.config)

    @property
    def denoiser_class(self) -> Any:
        """Imported when it is first asked for: not under another default device, which constants of its
        package's modules would be made on."""
        classes: Any = diffusers
        return getattr(classes, self.denoiser)

    @property
    def family(self) -> type[PipelinePolicy]:
        return next(one for one in supported().values() if one.parts.denoiser_class == self.denoiser)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the latents of an image."""
        of_vae = COMPRESSION if self.vae is None else 2 ** (len(self.vae["block_out_channels"]) - 1)
        compression = self.compression or of_vae
        return height // compression, width // compression

    def latents(self, height: int, width: int) -> int:
        """Numbers in the latents of one image."""
        rows, columns = self.grid(height, width)
        packed = 4 if self.denoiser in PACKED else 1
        return int(self.config["in_channels"]) * rows * columns // packed

    def inputs(self, height: int, width: int, samples: int = 1) -> dict[str, Any]:
        """Arguments of the denoiser for images of some size, on torch's default device."""
        rows, columns = self.grid(height, width)
        widths = self.family.condition_widths(self.config)
        text = torch.randn(samples, self.text_tokens, widths["prompt_embeds"])
        pooled = torch.randn(samples, widths["pooled"]) if "pooled" in widths else None
        time = torch.full((samples,), 0.5)
        packed = torch.randn(samples, rows * columns // 4, self.config["in_channels"])
        latents = torch.randn(samples, self.config["in_channels"], rows, columns)
        common = {"timestep": time, "encoder_hidden_states": text}
        if self.denoiser == "FluxTransformer2DModel":
            places = {
                "txt_ids": torch.zeros(self.text_tokens, 3),
                "img_ids": torch.zeros(packed.shape[1], 3),
            }
            return {
                "hidden_states": packed,
                # FLUX.1-schnell embeds none.
                "guidance": time if self.config.get("guidance_embeds") else None,
                "pooled_projections": pooled,
                **places,
                **common,
            }
        if self.denoiser == "QwenImageTransformer2DModel":
            return {
                "hidden_states": packed,
                "img_shapes": [[(1, rows // 2, columns // 2)]] * samples,
                **common,
            }
        if self.denoiser == "UNet2DConditionModel":
            added = {"text_embeds": pooled, "time_ids": torch.zeros(samples, 6)}
            return {"sample": latents, "added_cond_kwargs": added, **common}
        return {"hidden_states": latents, "pooled_projections": pooled, **common}


@dataclass(frozen=True)
class PassCost:
    """What one sample costs."""

    parameters: int
    """Of the denoiser, adapters not counted."""
    trained: int
    forward: int
    """FLOPs of a forward pass; a multiply-add is two."""
    train: int
    """FLOPs of a forward and a backward pass; nothing is computed twice."""
    activations: int
    """Bytes that the graph of one sample holds between them, in the dtypes of a bfloat16 model."""


def pass_cost(model: Published, height: int, width: int, lora: LoraConfig | None) -> PassCost:
    """Count one sample's passes.

    Args:
        lora: adapters on the family's attention projections; None: every weight is trained.
    """
    make = model.denoiser_class
    with quiet(), torch.device("meta"):
        denoiser = make(**model.config).to(torch.bfloat16)
        parameters = sum(parameter.numel() for parameter in denoiser.parameters())
        if lora is not None:
            add_lora(denoiser, lora, seed=0, targets=lora.targets or model.family.lora_targets)
        inputs = _lowered(model.inputs(height, width))
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            denoiser(**inputs, return_dict=False)
        kept: dict[Any, int] = {}
        weights = {id(weight) for weight in denoiser.parameters()}

        def keep(saved: Tensor) -> Tensor:
            # On the meta device attention keeps its matrix, which the kernels of a GPU compute again.
            matrix = saved.dim() >= 3 and saved.shape[-1] == saved.shape[-2]
            if id(saved) not in weights and id(saved._base) not in weights and not matrix:
                storage = saved.untyped_storage()
                kept[storage._cdata] = storage.nbytes()
            return saved

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved)
        with FlopCounterMode(display=False) as train:
            with hooks:
                prediction = denoiser(**inputs, return_dict=False)[0]
                loss = prediction.float().square().mean()
            loss.backward()
    return PassCost(
        parameters=parameters,
        trained=sum(p.numel() for p in denoiser.parameters() if p.requires_grad),
        forward=forward.get_total_flops(),
        train=train.get_total_flops(),
        activations=sum(kept.values()),
    )


def _lowered(inputs: dict[str, Any]) -> dict[str, Any]:
    def lower(value: Any) -> Any:
        if isinstance(value, dict):
            return _lowered(value)
        return value.to(torch.bfloat16) if isinstance(value, Tensor) else value

    return {name: lower(value) for name, value in inputs.items()}


def needed_passes(config: Config) -> dict[str, int]:
    """Passes of an update for each sample: forward and backward (`train`), and `forward` alone."""
    objective = config.objective
    if not isinstance(objective, DgpoConfig):
        raise ConfigError(f"objective.name {objective.name!r}: passes are counted for 'dgpo' alone")
    relative = objective.reference == "ema" or objective.clip_range is not None
    compared = int(relative and objective.reference_decay > 0) + int(objective.needs_base)
    timesteps = objective.timesteps.per_update
    return {"train": timesteps, "forward": timesteps * compared}
