"""Export the trained policy in the formats of diffusers: a pipeline, and a LoRA where one was trained.

Promises
- `from_pretrained(directory)` of the family's pipeline class and `pipeline.load_lora_weights(directory)` of
  stock diffusers load it, with no argument and no code of ours.
- The images are those of the trained policy: bit for bit for a LoRA and for full weights in float32, to
  rounding for a pipeline with its LoRA merged.
- The exported pipeline carries the solver that it was trained with; a model card says how to call it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from policy.errors import PolicyError
from policy.model_card import Training, write_card
from policy.pipeline_policy import PipelinePolicy
from policy.schedule import VP_SETTINGS, pipeline_scheduler
from services.config import RolloutConfig


def export_policy(
    policy: PipelinePolicy, directory: Path, *, rollout: RolloutConfig, training: Training | None = None
) -> list[Path]:
    """Write `pipeline/`, and `lora/` where adapters were trained, into a directory.

    Args:
        policy: with the weights to export installed, its text encoders and its VAE.
        rollout: the solver and the guidance that it was trained with.
        training: what the model card tells of how it came about.

    Returns:
        The directories written.

    Raises:
        PolicyError: a component is not loaded, or the stock pipeline cannot sample as the rollouts did.
    """
    written = [export_pipeline(policy, directory / "pipeline", rollout=rollout, training=training)]
    if policy.config.train == "lora":
        written.append(export_lora(policy, directory / "lora", rollout=rollout, training=training))
    return written


def export_pipeline(
    policy: PipelinePolicy, directory: Path, *, rollout: RolloutConfig, training: Training | None = None
) -> Path:
    """Write the whole pipeline, adapters merged; see `export_policy`."""
    policy.check_rollout(rollout)
    pipeline, denoiser = policy.pipeline, policy.parts.denoiser
    needed = (*(name for name in policy.parts.encoders if name not in policy.parts.optional), "vae")
    absent = [name for name in needed if getattr(pipeline, name) is None]
    if absent:
        raise PolicyError(
            f"cannot export a pipeline without {', '.join(absent)}: "
            "load the policy with text_encoders=True, vae=True"
        )
    own = {denoiser: getattr(pipeline, denoiser), "scheduler": pipeline.scheduler}
    try:
        pipeline.register_modules(**{denoiser: _merged(policy), "scheduler": pipeline_scheduler(rollout)})
        pipeline.save_pretrained(directory)
    finally:
        pipeline.register_modules(**own)
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
    policy: PipelinePolicy, directory: Path, *, rollout: RolloutConfig, training: Training | None = None
) -> Path:
    """Write the adapters in the format of peft and diffusers, alpha included; see `export_policy`."""
    if policy.config.train != "lora":
        raise PolicyError("there is no LoRA to export: model.train is 'full'; export the pipeline")
    from peft.utils import get_peft_model_state_dict

    policy.check_rollout(rollout)
    pipeline, lora, denoiser = policy.pipeline, policy.config.lora, policy.parts.denoiser
    layers = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(policy.transformer).items()
    }
    metadata = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets or policy.lora_targets),
    }
    type(pipeline).save_lora_weights(
        directory, **{f"{denoiser}_lora_layers": layers, f"{denoiser}_lora_adapter_metadata": metadata}
    )
    name, scheduler = type(pipeline).__name__, pipeline_scheduler(rollout)
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
    if rollout.sigmas == "vp":
        return tuple(VP_SETTINGS)
    if rollout.solver != "dpmsolver++":
        return ("shift",) if rollout.terminal is None else ("shift", "shift_terminal")
    return ("prediction_type", "use_flow_sigmas", "flow_shift", "solver_order")


def _merged(policy: PipelinePolicy) -> Any:
    transformer: Any = policy.transformer
    dtype = getattr(torch, policy.config.dtype)
    if policy.config.train == "full":
        return transformer if dtype == torch.float32 else copy.deepcopy(transformer).to(dtype)
    merged = copy.deepcopy(transformer)
    merged.fuse_lora()
    merged.unload_lora()
    return merged.to(dtype)
