"""What is exported loads in stock diffusers and draws what the trained policy draws."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusion3Pipeline
from numpy.typing import NDArray

from policy import Policy, PolicyError, load_policy
from policy.export import export_lora, export_pipeline, export_policy
from policy.model_card import Training, quoted
from policy.schedule import make_scheduler
from rollout_workers.sampling import sample
from services.config import LoraConfig, ModelConfig, RolloutConfig

PROMPT = 'a sign that says "K7QX"'
ROLLOUT = RolloutConfig(group_size=2, steps=4, guidance=2.0)
SEEDS = (4, 5)


def trained(config: ModelConfig) -> Policy:
    policy = load_policy(config, text_encoders=True, vae=True)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return policy


def ours(policy: Policy) -> NDArray[np.uint8]:
    return policy.decode(sample(policy, policy.encode(PROMPT), policy.negative(), SEEDS, ROLLOUT), batch=2)


def theirs(pipeline: Any) -> NDArray[np.uint8]:
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPT,
        height=32,
        width=64,
        num_inference_steps=ROLLOUT.steps,
        guidance_scale=ROLLOUT.guidance,
        max_sequence_length=1,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
    ).images
    return np.stack([np.asarray(image) for image in images])


def test_full_pipeline_round_trip(model_config: ModelConfig, tmp_path: Path) -> None:
    policy = trained(model_config)
    before = ours(load_policy(model_config, text_encoders=True, vae=True))
    (path,) = export_policy(
        policy, tmp_path, rollout=ROLLOUT, training=Training(name="spell-7", facts={"step": 7})
    )
    pipeline = StableDiffusion3Pipeline.from_pretrained(path)
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    assert np.abs(theirs(pipeline).astype(int) - ours(policy)).max() <= 1
    assert not np.array_equal(ours(policy), before)
    card = (path / "README.md").read_text()
    assert "| step | 7 |" in card
    assert "num_inference_steps=4" in card
    assert "# spell-7\n" in card


def test_lora_round_trip(model_config: ModelConfig, tmp_path: Path) -> None:
    config = model_config.model_copy(update={"train": "lora", "lora": LoraConfig(rank=4, alpha=6)})
    policy = trained(config)
    images, tensors = ours(policy), policy.tensors()
    whole, adapters = export_policy(policy, tmp_path, rollout=ROLLOUT)
    pipeline = StableDiffusion3Pipeline.from_pretrained(config.path)
    pipeline.scheduler = make_scheduler(ROLLOUT)
    base = theirs(pipeline)
    pipeline.load_lora_weights(adapters)
    assert np.abs(theirs(pipeline).astype(int) - images).max() <= 1
    assert not np.array_equal(base, images)
    assert "load_lora_weights" in (adapters / "README.md").read_text()
    merged = StableDiffusion3Pipeline.from_pretrained(whole)
    assert not any("lora" in name for name, _ in merged.transformer.named_parameters())
    assert np.abs(theirs(merged).astype(int) - images).max() <= 2
    # Exporting leaves the policy as it was.
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in policy.tensors().items())
    assert np.array_equal(ours(policy), images)


def test_scheduler_of_the_base_directory_is_untouched(model_config: ModelConfig, tmp_path: Path) -> None:
    policy = trained(model_config)
    export_pipeline(policy, tmp_path / "out", rollout=ROLLOUT)
    kind = json.loads((Path(model_config.path) / "model_index.json").read_text())["scheduler"][1]
    assert type(policy.pipeline.scheduler).__name__ == kind == "FlowMatchEulerDiscreteScheduler"


def test_impossible_exports_are_named(model_config: ModelConfig, tmp_path: Path) -> None:
    policy = load_policy(model_config, text_encoders=False, vae=False)
    with pytest.raises(PolicyError, match="text_encoder, text_encoder_2, vae"):
        export_pipeline(policy, tmp_path, rollout=ROLLOUT)
    with pytest.raises(PolicyError, match="no LoRA"):
        export_lora(policy, tmp_path, rollout=ROLLOUT)


@pytest.mark.parametrize("place", ["/models/tiny", '/a "model"', "C:\\models\\new", "/modèles/🎨"])
def test_a_place_is_a_string_of_python_whatever_is_in_it(place: str) -> None:
    assert ast.literal_eval(quoted(place)) == place
