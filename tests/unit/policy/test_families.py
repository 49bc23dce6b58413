"""What one family has beside what all keep (test_conformance.py), and the schedules they need."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from pydantic import ValidationError
from tiny_pipelines import TINY

from policy import PolicyError, load_encoders, load_policy
from policy.__main__ import main
from policy.packing import pack, unpack
from policy.registry import stock_rollout
from policy.schedule import make_schedule
from services.config import RolloutConfig


def built(name: str, directory: Path, **denoiser: Any) -> Path:
    """A tiny pipeline, some settings of its transformer changed on disk."""
    TINY[name].build(directory)
    file = directory / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | denoiser))
    return directory


def test_packing_is_the_stock_pipelines() -> None:
    latents = torch.randn(2, 3, 4, 6)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 3, 4, 6))
    assert torch.equal(unpack(tokens, 4, 6), latents)


def test_a_hub_id_and_its_revision_load_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked of the network: the cache has what the hub's own client would have put there."""
    commit, repository = "1" * 40, tmp_path / "models--acme--tiny"
    built("flux-dev", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = TINY["flux-dev"].config(tmp_path, path="acme/tiny", revision="v1")
    assert stock_rollout(config)["sigmas"] == "fractions"
    policy = load_policy(config, text_encoders=True, vae=True)
    assert policy.encode("a cat")["prompt_embeds"].shape == (12, 32)
    load_encoders(config, tmp_path / "conditions").prepare(["a cat"])
    (told,) = (tmp_path / "conditions").rglob("model.json")
    assert json.loads(told.read_text())["weights"] == {"hub": "acme/tiny", "commit": commit}
    with pytest.raises(PolicyError, match=r"'acme/tiny' \(revision v2\).*the model hub cannot be reached"):
        load_policy(config.model_copy(update={"revision": "v2"}), text_encoders=True, vae=True)


def test_prompts_of_qwen_image_are_as_long_as_they_are(tmp_path: Path) -> None:
    """So the conformance tests fill some up; beyond `max_sequence_length` they are cut."""
    directory = built("qwen-image", tmp_path / "qwen")
    policy = load_policy(TINY["qwen-image"].config(directory), text_encoders=True, vae=False)
    lengths = [len(policy.encode(prompt)["prompt_embeds"]) for prompt in (" ", "a cat", "a red cube")]
    assert lengths == [6, 10, 12]
    longest = policy.longest(policy.encode("a cat"))["prompt_embeds"]
    assert longest.shape == (12, 16)


def test_flux_is_told_the_configured_guidance(tmp_path: Path) -> None:
    directory = built("flux-dev", tmp_path / "flux")
    velocities = []
    for guidance in (None, 3.5, 2.0):
        policy = load_policy(
            TINY["flux-dev"].config(directory, embedded_guidance=guidance), text_encoders=True, vae=False
        )
        with torch.no_grad():
            x = policy.initial_latents([1])
            velocities.append(policy.velocity(x, torch.tensor(500.0), policy.encode("a cat")))
        rollout = TINY["flux-dev"].sampling()
        assert policy.call_arguments(rollout)["guidance_scale"] == (guidance or 3.5)
        assert "true_cfg_scale" not in policy.call_arguments(rollout)
    assert torch.equal(velocities[0], velocities[1])
    assert not torch.equal(velocities[0], velocities[2])


def test_transformers_that_their_pipeline_cannot_call_are_refused(tmp_path: Path) -> None:
    cases = {
        "qwen-image": ({"guidance_embeds": True}, "has guidance_embeds, with which a QwenImagePipeline"),
        "sana": ({"guidance_embeds": True}, r"has guidance_embeds \(SANA-Sprint\)"),
    }
    for name, (settings, match) in cases.items():
        directory = built(name, tmp_path / name, **settings)
        with pytest.raises(PolicyError, match=match):
            load_policy(TINY[name].config(directory), text_encoders=False, vae=False)


def test_sana_guides_away_from_an_empty_prompt_without_instruction(tmp_path: Path) -> None:
    directory = built("sana", tmp_path / "sana")
    policy = load_policy(TINY["sana"].config(directory), text_encoders=True, vae=False)
    negative = policy.negative()
    assert int(negative["mask"].sum()) == 1
    assert int(policy.encode("")["mask"].sum()) > 1
    assert policy.negative()["prompt_embeds"] is negative["prompt_embeds"]


def test_steps_that_no_rollout_takes_are_named(tmp_path: Path) -> None:
    for name, settings in {
        "sana": {"use_karras_sigmas": True},
        "sd3.5-medium": {"use_dynamic_shifting": True},
        "flux-dev": {"_class_name": "FlowMatchLCMScheduler"},
    }.items():
        directory = built(name, tmp_path / name)
        file = directory / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        told = next(iter(settings)).removeprefix("_class_name") or "FlowMatchLCMScheduler"
        with pytest.raises(PolicyError, match=f"{told}.*choose rollout.solver"):
            stock_rollout(TINY[name].config(directory))


@pytest.mark.parametrize("name", ["flux-dev", "qwen-image"])
def test_the_shift_follows_from_the_image_size(name: str, tmp_path: Path) -> None:
    directory = built(name, tmp_path / name)
    scheduler = json.loads((directory / "scheduler" / "scheduler_config.json").read_text())
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    for size in (512, 1024):
        mu = calculate_shift((size // 8) ** 2, *(scheduler[key] for key in keys))
        found = stock_rollout(TINY[name].config(directory, height=size, width=size))
        assert found["shift"] == pytest.approx(math.exp(mu))


@pytest.mark.parametrize("steps", [2, 10, 28])
def test_fractions_and_a_terminal_are_qwen_images_steps(steps: int) -> None:
    """The stock scheduler's dynamic shift by mu is a shift of exp(mu)."""
    mu = 0.63
    stock = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    stock.set_timesteps(sigmas=[1 - step / steps for step in range(steps)], mu=mu)
    rollout = RolloutConfig(
        solver="euler", sigmas="fractions", shift=math.exp(mu), terminal=0.02, steps=steps
    )
    schedule = make_schedule(rollout)
    torch.testing.assert_close(schedule.sigmas, stock.sigmas[:-1])
    torch.testing.assert_close(schedule.timesteps, stock.timesteps)
    assert float(schedule.sigmas[-1]) == pytest.approx(0.02, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"sigmas": "fractions"}, "sigmas 'fractions' is for solvers 'euler' and 'sde', not 'dpmsolver"),
        ({"solver": "heun", "terminal": 0.02}, "terminal is for solvers 'euler' and 'sde', not 'heun'"),
        ({"solver": "euler", "sigmas": "vp"}, "sigmas 'vp' has no flow shift: set shift to 1"),
    ],
)
def test_schedules_that_cannot_be_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        RolloutConfig(**settings)


def test_the_stock_schedule_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = built("flux-dev", tmp_path / "flux")
    assert main([str(directory), "--height", "32", "--width", "64"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == {"rollout": TINY["flux-dev"].rollout}
    assert main([str(tmp_path), "--height", "32", "--width", "64"]) == 2
    assert "no model_index.json" in capsys.readouterr().err
