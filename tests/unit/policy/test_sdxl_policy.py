"""SDXL predicts noise on a variance-preserving process; as a flow it is the same model, told otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from tiny_pipelines import TINY, build_sdxl

from learner.objectives.formulas import dsm_error
from policy import PolicyError, load_policy
from policy.families.sdxl import epsilon_weight, vp_sigmas, vp_timestep
from policy.pipeline_policy import PipelinePolicy
from policy.schedule import VP_SETTINGS, initial_scale, make_schedule
from rollout_workers.sampling import sample
from rollout_workers.solvers import solve
from services.config import RolloutConfig

PROMPT = "a red cube"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "sdxl"
    build_sdxl(directory)
    return directory


@pytest.fixture(scope="module")
def policy(directory: Path) -> PipelinePolicy:
    return load_policy(TINY["sdxl"].config(directory), text_encoders=True, vae=True)


def vp_rollout(steps: int, **changes: Any) -> RolloutConfig:
    return RolloutConfig(**{"solver": "euler", "sigmas": "vp", "shift": 1.0, "steps": steps} | changes)


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("time", [1, 301, 901, 999])
def test_the_velocitys_error_is_that_of_epsilon_weighted(policy: PipelinePolicy, time: int) -> None:
    """From the U-Net itself on alpha_bar: x_vp = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise."""
    x0, noise = gaussian(2, *policy.latent_shape(), seed=0), gaussian(2, *policy.latent_shape(), seed=1)
    condition = policy.encode(PROMPT)
    scheduler = EulerDiscreteScheduler(**VP_SETTINGS)
    alpha_bar = scheduler.alphas_cumprod[time]
    with torch.no_grad():
        epsilon = policy.transformer(
            alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise,
            time,
            encoder_hidden_states=condition["prompt_embeds"].expand(2, -1, -1),
            added_cond_kwargs={
                "text_embeds": condition["pooled"].expand(2, -1),
                "time_ids": torch.tensor([[32.0, 64.0, 0, 0, 32.0, 64.0]] * 2),
            },
            return_dict=False,
        )[0]
        sigma_ve = ((1 - alpha_bar) / alpha_bar).sqrt()
        sigma = sigma_ve / (1 + sigma_ve)
        x = (1 - sigma) * x0 + sigma * noise
        velocity = policy.velocity(x, sigma * 1000, condition)
    # What the prediction says of x0, in the VP form, and v = epsilon - x0.
    meant = (x * (1 + sigma_ve) - sigma_ve * epsilon, epsilon)
    torch.testing.assert_close(velocity, meant[1] - meant[0], rtol=1e-3, atol=1e-3)
    weight = epsilon_weight(sigma)
    assert float(weight) == pytest.approx(float((1 + sigma_ve) ** 2), rel=1e-4)
    of_epsilon = (noise - epsilon).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(
        dsm_error(velocity, noise - x0), weight * of_epsilon, rtol=1e-3, atol=1e-4 * float(weight)
    )


def test_the_weight_grows_with_the_noise() -> None:
    weights = epsilon_weight(torch.from_numpy(vp_sigmas()))
    assert float(weights[0]) == pytest.approx(1.06, abs=0.005)
    assert float(weights[-1]) == pytest.approx(243.8, abs=0.1)
    assert bool((weights.diff() > 0).all())


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DDIMScheduler])
def test_euler_in_the_flow_is_the_stock_step(kind: Any) -> None:
    """For any model of epsilon; Euler's in the variance-exploding form, DDIM's in the preserving one."""
    rollout, weights = vp_rollout(10), gaussian(4, 4, seed=3) * 0.3
    settings = VP_SETTINGS if kind is EulerDiscreteScheduler else VP_SETTINGS | {"clip_sample": False}
    scheduler = kind(**settings, **({} if kind is EulerDiscreteScheduler else {"set_alpha_to_one": True}))
    scheduler.set_timesteps(10)

    def epsilon(x_vp: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ij,njhw->nihw", weights, x_vp) * (1 + time.view(-1, 1, 1, 1) / 1000)

    def velocity(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        sigma = time / 1000
        said = epsilon(x / (sigma.square() + (1 - sigma).square()).sqrt(), vp_timestep(time.view(1)))
        return (said - x) / (1 - sigma)

    start = gaussian(2, 4, 6, 6, seed=0)
    x = start * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        given = scheduler.scale_model_input(x, time)
        x = scheduler.step(epsilon(given, time.float().view(1)), time, x, return_dict=False)[0]
    torch.testing.assert_close(solve(rollout, velocity, start), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [2, 3, 10, 25, 50])
def test_the_unet_is_told_whole_timesteps(steps: int) -> None:
    scheduler = EulerDiscreteScheduler(**VP_SETTINGS)
    scheduler.set_timesteps(steps)
    schedule = make_schedule(vp_rollout(steps))
    assert torch.equal(vp_timestep(schedule.timesteps), scheduler.timesteps)
    scale = float(scheduler.init_noise_sigma) / (1 + float(scheduler.sigmas[0]))
    assert initial_scale(vp_rollout(steps)) == pytest.approx(scale)


def test_between_whole_timesteps_it_is_interpolated() -> None:
    levels = torch.from_numpy(vp_sigmas())
    halves = vp_timestep((levels[1:] + levels[:-1]) / 2 * 1000)
    assert bool((halves > torch.arange(999)).all())
    assert bool((halves < torch.arange(1, 1000)).all())


def test_noise_beyond_the_process_is_refused(policy: PipelinePolicy) -> None:
    x = policy.initial_latents([1])
    for timestep in (1000.0, 937.0, 20.0):
        with pytest.raises(PolicyError, match=r"0\.0283 to 0\.9360.*set rollout\.sigmas to vp"):
            policy.velocity(x, torch.tensor(timestep), policy.encode(PROMPT))


def test_the_stochastic_sampler_without_noise_is_eulers(policy: PipelinePolicy) -> None:
    condition = policy.encode(PROMPT)
    euler = sample(policy, condition, None, (1, 2), vp_rollout(4))
    quiet = sample(policy, condition, None, (1, 2), vp_rollout(4, solver="sde", noise_level=1e-6))
    torch.testing.assert_close(quiet, euler, rtol=1e-3, atol=1e-3)


def test_other_processes_are_refused(directory: Path, tmp_path: Path) -> None:
    changes = {
        "prediction_type": ("v_prediction", "valid are models that predict 'epsilon'"),
        "rescale_betas_zero_snr": (True, "has rescale_betas_zero_snr; valid are models trained without it"),
        "beta_start": (None, r"beta_start None; SDXL's noise schedule has 0\.00085"),
        "beta_end": (0.02, r"beta_end 0\.02; SDXL's noise schedule has 0\.012"),
    }
    for name, (value, match) in changes.items():
        copy = tmp_path / name
        shutil.copytree(directory, copy)
        file = copy / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
        with pytest.raises(PolicyError, match=match):
            load_policy(TINY["sdxl"].config(copy), text_encoders=False, vae=False)


def test_guidance_leads_away_from_zeros_or_from_the_empty_prompt(
    policy: PipelinePolicy, directory: Path, tmp_path: Path
) -> None:
    assert all(not tensor.any() for tensor in policy.negative().values())
    copy = tmp_path / "empty"
    shutil.copytree(directory, copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    other = load_policy(TINY["sdxl"].config(copy), text_encoders=True, vae=False)
    empty = policy.encode("")
    assert all(torch.equal(tensor, empty[name]) for name, tensor in other.negative().items())
    assert np.any(empty["pooled"].numpy())
