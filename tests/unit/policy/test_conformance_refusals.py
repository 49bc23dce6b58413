"""Every family refuses what does not fit, and says what would be valid."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family_case import PROMPT, SEEDS, Case

from policy import PolicyError, load_policy
from policy.pipeline_policy import PipelinePolicy
from rollout_workers.sampling import sample
from services.config import LoraConfig


def test_rollouts_that_the_stock_pipeline_could_not_repeat_are_refused(
    case: Case, policy: PipelinePolicy
) -> None:
    condition = policy.encode(PROMPT)
    good = case.tiny.sampling()
    wrong = "scheduler" if good.sigmas != "scheduler" else "fractions"
    changes = {"solver": "euler", "sigmas": wrong, "shift": 3.0, "terminal": None}
    with pytest.raises(PolicyError, match=f"set rollout.sigmas to {policy.sigmas}"):
        sample(policy, condition, None, SEEDS, case.tiny.sampling(**changes))
    if "heun" not in policy.solvers:
        changes = {"solver": "heun", "sigmas": "scheduler", "terminal": None, "shift": 3.0}
        with pytest.raises(PolicyError, match=r"rollout\.solver 'heun'.*valid: euler, sde"):
            sample(policy, condition, None, SEEDS, case.tiny.sampling(**changes))


def test_what_is_missing_or_wrong_is_named(case: Case, policy: PipelinePolicy, tmp_path: Path) -> None:
    parts, count = policy.parts, iter(range(100))

    def broken(index: dict[str, Any] | None = None, **files: dict[str, Any]) -> Path:
        copy = tmp_path / str(next(count))
        shutil.copytree(case.directory, copy)
        for name, changes in {"model_index": index or {}, **files}.items():
            at = copy if name == "model_index" else copy / name
            file = at / ("model_index.json" if name == "model_index" else "config.json")
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return copy

    def refuses(match: str, directory: Path = case.directory, **changes: Any) -> None:
        config = case.config(**{"path": str(directory), **changes})
        with pytest.raises(PolicyError, match=match):
            load_policy(config, text_encoders=True, vae=True)

    dropped = case.tiny.dropped
    refuses(
        rf"has no {dropped}; a {parts.pipeline} needs {parts.denoiser}, vae", broken({dropped: [None, None]})
    )
    gone = broken()
    shutil.rmtree(gone / parts.denoiser)
    refuses(f"names {parts.denoiser}, but .* is missing", gone)
    bare = broken()
    next((bare / parts.denoiser).glob("*.safetensors")).unlink()
    refuses("cannot be loaded", bare)
    refuses(
        f"the {parts.denoiser} of a {parts.pipeline} must be of class {parts.denoiser_class}, found Wrong",
        broken({parts.denoiser: ["diffusers", "Wrong"]}),
    )
    refuses("the vae of a .* must be of class", broken({"vae": ["diffusers", "AutoencoderTiny"]}))
    refuses(
        "'WanPipeline' is not supported; supported: FluxPipeline, QwenImagePipeline, SanaPipeline, ",
        broken({"_class_name": "WanPipeline"}),
    )
    channels = policy._configs.denoiser["in_channels"] * 4
    refuses(
        r"takes latents of 16 channels, the VAE has 4", broken(**{parts.denoiser: {"in_channels": channels}})
    )
    refuses("must be multiples of", height=36, width=52)
    refuses(
        r"model\.lora\.targets: 'attn\.to_z' ends the name of no linear layer; valid endings: .*to_q",
        lora=LoraConfig(rank=4, targets=("attn.to_z",)),
    )
    if case.name != "flux-dev":
        refuses(r"model\.embedded_guidance would do nothing", embedded_guidance=3.5)


def test_shapes_that_do_not_fit_are_named(case: Case, policy: PipelinePolicy, tmp_path: Path) -> None:
    condition, time = policy.encode(PROMPT), torch.tensor(600.0)
    x = policy.initial_latents([1])
    with pytest.raises(ValueError, match=r"latents are \(1, 4, 8, 8\), expected \(N, \*\(4, 8, 16\)\)"):
        policy.velocity(x[..., :8], time, condition)
    for name in policy.condition_widths(policy._configs.denoiser):
        cut = condition | {name: condition[name][..., :-1]}
        with pytest.raises(PolicyError, match=rf"wants {name} of width \d+, the condition has \d+"):
            policy.velocity(x, time, cut)
        with pytest.raises(PolicyError, match=rf"wants {name} of width \d+, the condition has none"):
            policy.velocity(x, time, {key: value for key, value in condition.items() if key != name})
