"""Export the trained policy in the formats of diffusers: a pipeline, and a LoRA where one was trained.

Promises
- `StableDiffusion3Pipeline.from_pretrained(directory)` and `pipeline.load_lora_weights(directory)` of stock
  diffusers load it, with no argument and no code of ours.
- The images are those of the trained policy: bit for bit for a LoRA and for full weights in float32, to
  rounding for a pipeline with its LoRA merged.
- The exported pipeline carries the solver that it was trained with; a model card says how to call it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from policy.base import Policy
from policy.errors import PolicyError
from policy.model_card import Training, write_card
from policy.schedule import make_scheduler
from services.config import RolloutConfig


def export_policy(
    policy: Policy, directory: Path, *, rollout: RolloutConfig, training: Training | None = None
) -> list[Path]:
    """Write `pipeline/`, and `lora/` where adapters were trained, into a directory.

    Args:
        policy: with the weights to export installed, its text encoders and its VAE.
        rollout: the solver and the guidance that it was trained with.
        training: what the model card tells of how it came about.

    Returns:
        The directories written.

    Raises:
        PolicyError: a component is not loaded.
    """
    written = [export_pipeline(policy, directory / "pipeline", rollout=rollout, training=training)]
    if policy.config.train == "lora":
        written.append(export_lora(policy, directory / "lora", rollout=rollout, training=training))
    return written


def export_pipeline(
    policy: Policy, directory: Path, *, rollout: RolloutConfig, training: Training | None = None
) -> Path:
    """Write the whole pipeline, adapters merged; see `export_policy`."""
    pipeline = policy.pipeline
    absent = [name for name in ("text_encoder", "vae") if getattr(pipeline, name) is None]
    if absent:
        raise PolicyError(
            f"cannot export a pipeline without {', '.join(absent)}: "
            "load the policy with text_encoders=True, vae=True"
        )
    own_transformer, own_scheduler = pipeline.transformer, pipeline.scheduler
    try:
        pipeline.register_modules(transformer=_merged(policy), scheduler=make_scheduler(rollout))
        pipeline.save_pretrained(directory)
    finally:
        pipeline.register_modules(transformer=own_transformer, scheduler=own_scheduler)
    name = type(pipeline).__name__
    write_card(
        policy,
        directory,
        rollout,
        training,
        imports=name,
        load=f'pipeline = {name}.from_pretrained("{directory.name}")',
    )
    return directory


def export_lora(
    policy: Policy, directory: Path, *, rollout: RolloutConfig, training: Training | None = None
) -> Path:
    """Write the adapters in the format of peft and diffusers, alpha included; see `export_policy`."""
    if policy.config.train != "lora":
        raise PolicyError("there is no LoRA to export: model.train is 'full'; export the pipeline")
    from peft.utils import get_peft_model_state_dict

    pipeline, lora = policy.pipeline, policy.config.lora
    layers = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(policy.transformer).items()
    }
    type(pipeline).save_lora_weights(
        directory,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata={
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "target_modules": list(lora.targets),
        },
    )
    name, scheduler = type(pipeline).__name__, make_scheduler(rollout)
    kind = type(scheduler).__name__
    settings = {key: scheduler.config[key] for key in _scheduler_settings(rollout)}
    arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    load = (
        f'pipeline = {name}.from_pretrained("{policy.config.path}")\n'
        f"pipeline.scheduler = {kind}({arguments})\n"
        f'pipeline.load_lora_weights("{directory.name}")'
    )
    write_card(policy, directory, rollout, training, imports=f"{kind}, {name}", load=load)
    return directory


def _scheduler_settings(rollout: RolloutConfig) -> tuple[str, ...]:
    if rollout.solver != "dpmsolver++":
        return ("shift",)
    return ("prediction_type", "use_flow_sigmas", "flow_shift", "solver_order")


def _merged(policy: Policy) -> Any:
    transformer: Any = policy.transformer
    dtype = getattr(torch, policy.config.dtype)
    if policy.config.train == "full":
        return transformer if dtype == torch.float32 else copy.deepcopy(transformer).to(dtype)
    merged = copy.deepcopy(transformer)
    merged.fuse_lora()
    merged.unload_lora()
    return merged.to(dtype)
