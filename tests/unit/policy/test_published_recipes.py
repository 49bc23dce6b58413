"""Recipes for published models: each samples and trains as its family can, on a tiny model of that family."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_pipelines import TINY

from benchmarks.recipe_cost import published_recipes, table
from learner.update import TrainingGroup, Updater
from policy import load_policy
from policy.registry import supported
from rollout_workers.sampling import sample
from services.config_file import PROJECT_ROOT, load_config
from services.planning.published import MODELS

PAGE = (PROJECT_ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = {name: (config, model) for name, config, model in published_recipes()}
OF_EACH_FAMILY = {
    "sd35-medium-geneval": "sd3.5-medium",
    "flux-dev-pickscore-8gpu": "flux-dev",
    "qwen-image-pickscore-8gpu": "qwen-image",
    "sdxl-pickscore-8gpu": "sdxl",
}
SMALL = (
    *("model.height=32", "model.width=32", "model.dtype=float32", "model.lora.rank=2"),
    *("model.max_sequence_length=12", "model.device=cpu", "rollout.group_size=2", "learner.micro_batch=1"),
    *("learner.groups_per_step=1", "learner.ranks=1"),
)


def test_every_model_has_a_recipe() -> None:
    assert {config.model.path for config, _ in RECIPES.values()} == {
        model["hub"] for name, model in MODELS.items() if not name.endswith("-tiny")
    }


@pytest.mark.parametrize(("recipe", "tiny"), OF_EACH_FAMILY.items())
def test_a_tiny_model_of_the_family_is_sampled_and_trained(recipe: str, tiny: str, tmp_path: Path) -> None:
    TINY[tiny].build(tmp_path)
    config = load_config(recipe, [*SMALL, f"model.path={tmp_path}"])
    policy = load_policy(config.model, text_encoders=True, vae=True)
    condition = policy.encode("a photo of a bench")
    negative = policy.negative() if config.rollout.guidance > 1 else None
    latents = sample(policy, condition, negative, range(2), config.rollout)
    assert policy.decode(latents, 1).shape == (2, 32, 32, 3)
    before, updater = policy.tensors(), Updater(policy, config)
    rewards = {config.rewards[0].name: [0.0, 1.0]}
    group = TrainingGroup(ordinal=0, latents=latents, rewards=rewards, condition=condition)
    assert updater.step([group], 0).grad_norm
    assert any(not torch.equal(tensor, before[name]) for name, tensor in policy.tensors().items())


@pytest.mark.parametrize(
    ("recipe", "scheduler"),
    [
        ("flux-dev-pickscore-8gpu", {"base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 4096}),
        (
            "qwen-image-pickscore-8gpu",
            {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
        ),
        ("sdxl-pickscore-8gpu", {}),
    ],
)
def test_rollouts_step_as_the_published_pipelines(recipe: str, scheduler: dict[str, float]) -> None:
    config, model = RECIPES[recipe]
    family = supported()[model.family.parts.pipeline]
    dynamic = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    vae = {"block_out_channels": [1] * 4, "temperal_downsample": [True] * 3}
    configs = SimpleNamespace(denoiser=model.config, vae=vae, scheduler=dynamic | scheduler)
    stock = family.stock_rollout(config.model, configs)
    for key, value in stock.items():
        found = getattr(config.rollout, key)
        assert found == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), key


@pytest.mark.parametrize("recipe", RECIPES)
def test_its_head_says_what_the_page_says(recipe: str) -> None:
    (row,) = re.findall(rf"^\| `{recipe}` \|(.*)\|$", PAGE, flags=re.MULTILINE)
    *_, gpus, gib, seconds = (cell.strip() for cell in row.split("|"))
    text = (PROJECT_ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    count = gpus.partition(":")[0]
    assert f"# GPUs: {count} of 80 GB, {gib} GiB in use on the fullest; {seconds} s an update." in text
    assert "Extrapolated, not measured" in text


CFG_FREE = {
    "sd35-medium-geneval-2a-8gpu": ("frozen", 4.5, (10, 100), (1e-5, 1e-4)),
    "sd35-medium-geneval-2b-8gpu": ("ema", 1.0, (2000, 5000), (1e-5, 1e-5)),
}
"""Reference, its guidance, and ranges of beta and clip_range, as is typical of the mode."""


@pytest.mark.parametrize("name", CFG_FREE)
def test_modes_without_guidance_have_their_typical_values(name: str) -> None:
    config, (reference, guidance, betas, clips) = RECIPES[name][0], CFG_FREE[name]
    objective: Any = config.objective
    assert (objective.cfg_free, config.rollout.guidance) == (True, 1.0)
    assert (objective.reference, objective.kl_cfg) == (reference, guidance)
    assert betas[0] <= objective.beta <= betas[1] and clips[0] <= objective.clip_range <= clips[1]


def test_published_parameters_are_in_the_recipes() -> None:
    """DGPO's for SD3.5-medium, on any number of GPUs."""
    published = {"geneval": (100, 0.02, 5), "ocr": (100, 0.02, 7), "pickscore": (10, 0.001, 7)}
    for name, (config, _) in RECIPES.items():
        if not name.startswith("sd35-medium") or name in CFG_FREE:
            continue
        objective, learner, rollout = config.objective, config.learner, config.rollout
        said = (objective.beta, objective.kl, objective.timesteps.first)  # type: ignore[union-attr]
        assert said == published[config.rewards[0].name], name
        assert (objective.timesteps.per_update, objective.clip_range) == (4, 0.01)  # type: ignore[union-attr]
        assert (rollout.steps, rollout.solver, rollout.shift, rollout.guidance) == (10, "dpmsolver++", 3, 4.5)
        assert (config.model.lora.rank, config.model.lora.alpha, config.model.height) == (64, 128, 512)
        assert (learner.learning_rate, learner.betas, learner.weight_decay) == (3e-4, (0.9, 0.999), 1e-4)
        assert 16 <= rollout.group_size <= 24
        assert 8 <= learner.groups_per_step <= 24


@pytest.mark.slow
@pytest.mark.timeout(900)  # five models are made on the meta device
def test_the_table_of_the_page_is_what_is_computed() -> None:
    assert "\n".join(table()) in PAGE
