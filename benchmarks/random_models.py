"""Published models with random weights, to be timed.

Promises
- Weights are random and so are conditions, of the real shapes (services/planning/published.py): no tokenizer
  is made, and text encoders by themselves.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from policy.base import Condition
from policy.families.sd3 import StableDiffusion3Policy
from policy.loading import Configs, find_device, quiet
from services.config import ModelConfig
from services.planning.published import Published


def random_pipeline(model: Published, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A stock SD3 pipeline without text encoders, its transformer and VAE of random weights on a device."""
    classes: Any = diffusers
    # Before the block: what is imported in there has its constants on the device for good.
    make_vae, _ = classes.AutoencoderKL, model.denoiser_class
    torch.manual_seed(seed)
    # Modules fill their own weights, which is quick only where the device is.
    with quiet(), torch.device(device):
        transformer, vae = model.make().to(dtype), make_vae(**(model.vae or {})).to(dtype)
    pipeline = classes.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=classes.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(StableDiffusion3Policy.parts.text),
    )
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_policy(model: Published, config: ModelConfig, *, base: bool = True) -> StableDiffusion3Policy:
    """The project's own policy around `random_pipeline`, on the device and in the dtype of `config`."""
    device = find_device(config.device)
    pipeline = random_pipeline(model, device, getattr(torch, config.dtype))
    configs = Configs(denoiser=dict(pipeline.transformer.config), vae=dict(pipeline.vae.config), scheduler={})
    return StableDiffusion3Policy.around(pipeline, config, configs, base=base)


def random_text_encoders(model: Published, device: torch.device, dtype: torch.dtype) -> list[Any]:
    """The text encoders, on a device."""
    # Imported before the block, as above.
    kinds = [getattr(transformers, told["encoder"]) for told in model.text_encoders or ()]
    made: list[Any] = []
    for kind, told in zip(kinds, model.text_encoders or (), strict=True):
        with quiet(), torch.device(device):
            made.append(kind(kind.config_class(**told["config"])).to(dtype).eval())
    return made


@torch.no_grad()
def encode_random(model: Published, encoders: list[Any], prompts: int) -> list[Tensor]:
    """What each encoder makes of so many prompts of random tokens: its last layer."""
    states = []
    for encoder, told in zip(encoders, model.text_encoders or (), strict=True):
        shape = (prompts, told["tokens"])
        tokens = torch.randint(encoder.config.vocab_size, shape, device=encoder.device)
        # All layers' as the pipelines ask, which take the last but one of CLIP.
        states.append(encoder(tokens, output_hidden_states=True).hidden_states[-1])
    return states


def random_condition(model: Published, device: torch.device, dtype: torch.dtype, seed: int) -> Condition:
    """Of one prompt, in the real shapes: `prompt_embeds` (tokens, width) and `pooled` (width,)."""
    source = torch.Generator().manual_seed(seed)
    widths = model.family.condition_widths(model.config)
    shapes = {"prompt_embeds": (model.text_tokens, widths["prompt_embeds"]), "pooled": (widths["pooled"],)}
    return {name: torch.randn(shape, generator=source).to(device, dtype) for name, shape in shapes.items()}
