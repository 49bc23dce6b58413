"""Export the trained policy in the formats of diffusers: a pipeline, and a LoRA where one was trained.

Promises
- Stock diffusers loads both, with no code of ours, by the call that their model cards show (where a base
  model was a local folder, with its place filled in). It says the dtype
  (left out, diffusers and transformers would take different ones of a bfloat16 pipeline, which then fails)
  and which optional parts there are none of.
- The images are those of the trained policy. In float32 but for last digits (of a pixel 1 of 255, 2 with a
  LoRA merged), in bfloat16 but for its rounding (docs/models.md).
- The exported pipeline carries the solver that it was trained with.
- The policy is as it was; what is not trained is not copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from policy.adapters import ADAPTER_NAME
from policy.base_digest import base_digest
from policy.errors import PolicyError
from policy.model_card import Training, assigned, base_place, loading, loading_base, quoted, write_card
from policy.pipeline_policy import PipelinePolicy
from policy.schedule import VP_SETTINGS, pipeline_scheduler
from services.config import RolloutConfig
from services.exported_lora import BASE_DIGEST, lora_file

Exported = Literal["pipeline", "lora"]
"""What an export consists of, by the names of its directories."""


def export_policy(
    policy: PipelinePolicy,
    directory: Path,
    *,
    rollout: RolloutConfig,
    training: Training | None = None,
    only: Exported | None = None,
) -> list[Path]:
    """Write `pipeline/`, and `lora/` where adapters were trained, into a directory.

    Args:
        policy: with the weights to export installed, its text encoders and its VAE (not for a LoRA alone).
        rollout: the solver and the guidance that it was trained with.
        training: what the model card tells of how it came about.
        only: one of the two.

    Returns:
        The directories written.

    Raises:
        PolicyError: a component is not loaded, or the stock pipeline cannot sample as the rollouts did.
    """
    written = []
    if only != "lora":
        written.append(export_pipeline(policy, directory / "pipeline", rollout=rollout, training=training))
    if only == "lora" or (only is None and policy.config.train == "lora"):
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
        pipeline.register_modules(**{denoiser: merged(policy), "scheduler": pipeline_scheduler(rollout)})
        pipeline.save_pretrained(directory)
    finally:
        pipeline.register_modules(**own)
    write_card(
        policy,
        directory,
        rollout,
        training,
        imports=type(pipeline).__name__,
        load=loading(policy, quoted(directory.name), revision=None),
    )
    return directory


def export_lora(
    policy: PipelinePolicy, directory: Path, *, rollout: RolloutConfig, training: Training | None = None
) -> Path:
    """Write the adapters as peft and diffusers do, with alpha and base model; see `export_policy`."""
    if policy.config.train != "lora":
        raise PolicyError("there is no LoRA to export: model.train is 'full'; export the pipeline")
    from peft.utils import get_peft_model_state_dict

    policy.check_rollout(rollout)
    pipeline, config, denoiser = policy.pipeline, policy.config, policy.parts.denoiser
    layers = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(policy.transformer).items()
    }
    metadata = {
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "target_modules": list(config.lora.targets or policy.lora_targets),
        # As peft names them; services/exported_lora.py reads them again.
        "base_model_name_or_path": base_place(config),
        "revision": config.revision,
    }
    type(pipeline).save_lora_weights(
        directory, **{f"{denoiser}_lora_layers": layers, f"{denoiser}_lora_adapter_metadata": metadata}
    )
    # Beside what peft knows, which takes no other key.
    _note(lora_file(directory), {BASE_DIGEST: base_digest(policy.transformer.state_dict())})
    name, scheduler = type(pipeline).__name__, pipeline_scheduler(rollout)
    kind = type(scheduler).__name__
    settings = [f"{key}={scheduler.config[key]!r}" for key in _scheduler_settings(rollout)]
    load = (
        f"{loading_base(policy)}\n"
        f"{assigned('pipeline.scheduler', kind, settings)}\n"
        f'pipeline.load_lora_weights("{directory.name}")'
    )
    write_card(policy, directory, rollout, training, imports=f"{kind}, {name}", load=load)
    return directory


def _note(file: Path, told: dict[str, str]) -> None:
    """Adds to the metadata of a safetensors file."""
    from safetensors import safe_open
    from safetensors.torch import load, save_file

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    # From a copy: a file that is mapped must not be written.
    save_file(load(file.read_bytes()), file, metadata | told)


def merged(policy: PipelinePolicy) -> Any:
    """The denoiser as it is exported: without adapters, in the dtype of the configuration.

    It shares with the policy every tensor that is the same in both: only those with an adapter, or of another
    dtype, are made anew.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    transformer: Any = policy.transformer
    dtype: torch.dtype = getattr(torch, policy.config.dtype)
    adapters: dict[str, Any] = {
        name: module for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)
    }
    state: dict[str, Tensor] = {}
    for name, tensor in transformer.state_dict().items():
        module, _, own = name.rpartition(".base_layer.")
        if module in adapters and own == "weight":
            tensor = tensor + adapters[module].get_delta_weight(ADAPTER_NAME)
        if ".lora_" not in name:
            state[f"{module}.{own}" if module else name] = tensor.detach().to(dtype)
    with torch.device("meta"):
        made = type(transformer).from_config(transformer.config)
    made.load_state_dict(state, assign=True)
    return made.requires_grad_(False).eval()


def _scheduler_settings(rollout: RolloutConfig) -> tuple[str, ...]:
    if rollout.sigmas == "vp":
        return tuple(VP_SETTINGS)
    if rollout.solver != "dpmsolver++":
        return ("shift",) if rollout.terminal is None else ("shift", "shift_terminal")
    return ("prediction_type", "use_flow_sigmas", "flow_shift", "solver_order")
