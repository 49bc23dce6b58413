"""What every family must keep, on tiny random models of its real architecture in its real format.

Published weights are not loaded: what is compared is our computation with the stock pipeline's, from the same
weights, prompt and noise.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from family_case import PROMPT, SEEDS, Case, differ, ours, theirs
from tiny_pipelines import TINY, VARIANTS, disturbed
from torch import Tensor

from learner.objectives.base import TrainingGroup
from learner.update import Updater
from policy import load_policy
from policy.pipeline_policy import PipelinePolicy
from policy.probe import TOLERANCE, VelocityDrift, check_probe, probe, probe_error
from policy.registry import stock_rollout, supported
from policy.schedule import make_schedule, pipeline_scheduler
from rollout_workers.sampling import sample
from services.config import Config

variants_too = pytest.mark.parametrize("case", [*TINY, *VARIANTS], indirect=True)
"""Where models of a family may differ."""


class Calls:
    """What a denoiser was called with, and what it said."""

    def __init__(self, denoiser: Any) -> None:
        self.found: list[tuple[dict[str, Any], Tensor]] = []
        self._handle = denoiser.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        named = dict(zip(("hidden_states", "timestep"), args, strict=False))
        given = {**named, **kwargs, **(kwargs.get("added_cond_kwargs") or {})}
        self.found.append(({k: v.clone() for k, v in given.items() if torch.is_tensor(v)}, output[0].clone()))

    def stop(self) -> list[tuple[dict[str, Any], Tensor]]:
        self._handle.remove()
        return self.found


def test_every_family_is_under_test() -> None:
    assert {tiny.pipeline.__name__ for tiny in TINY.values()} == set(supported())


def test_rollouts_can_step_as_the_published_scheduler(case: Case, policy: PipelinePolicy) -> None:
    found = stock_rollout(case.config())
    assert found == {
        key: pytest.approx(value) if isinstance(value, float) else value
        for key, value in case.tiny.rollout.items()
    }
    rollout = case.tiny.sampling(**found)
    pipeline = case.stock()
    theirs(pipeline, policy, rollout)
    sigmas = pipeline.scheduler.sigmas[:-1].float()
    expected = sigmas / (1 + sigmas) if rollout.sigmas == "vp" else sigmas
    torch.testing.assert_close(make_schedule(rollout).sigmas, expected, rtol=1e-5, atol=1e-6)


@variants_too
def test_the_denoiser_is_called_as_the_stock_pipeline_calls_it(case: Case, policy: PipelinePolicy) -> None:
    for rollout in case.rollouts()[:2]:
        pipeline = case.stock()
        stock_calls, our_calls = (
            Calls(getattr(pipeline, policy.parts.denoiser)),
            Calls(policy.transformer),
        )
        theirs(pipeline, policy, rollout)
        sample(policy, policy.encode(PROMPT), policy.negative(), SEEDS, rollout)
        expected, found = stock_calls.stop(), our_calls.stop()
        assert len(found) == len(expected)
        for (given, said), (wanted, answer) in zip(found, expected, strict=True):
            assert given.keys() == wanted.keys()
            for name, tensor in wanted.items():
                torch.testing.assert_close(given[name], tensor.expand_as(given[name]), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(said, answer, rtol=1e-4, atol=1e-5)


def test_a_velocity_is_what_moves_the_stock_latents(case: Case, policy: PipelinePolicy) -> None:
    """By Euler's rule: (x after the first step - x) / (sigma after - sigma), in the terms of the flow."""
    rollout = case.tiny.sampling(**case.tiny.rollout | {"solver": "euler"}, guidance=2.5)
    pipeline, kept = case.stock(), []
    pipeline.scheduler = pipeline_scheduler(rollout)

    def keep(_: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept.append(tensors["latents"].clone())
        return tensors

    pipeline.__call__(
        PROMPT,
        generator=torch.Generator().manual_seed(4),
        callback_on_step_end=keep,
        **policy.call_arguments(rollout),
    )
    schedule = make_schedule(rollout)
    first, second = (in_flow(policy, kept[step], float(schedule.following[step])) for step in (0, 1))
    moved = (second - first) / (schedule.following[1] - schedule.following[0])
    with torch.no_grad():
        velocity = policy.velocity(
            first,
            schedule.timesteps[1],
            policy.encode(PROMPT),
            guidance=2.5,
            negative=policy.negative(),
        )
    torch.testing.assert_close(velocity, moved, rtol=1e-3, atol=1e-4)


def in_flow(policy: PipelinePolicy, latents: Tensor, sigma: float) -> Tensor:
    """Latents as the stock pipeline has them in its loop -> (1 - sigma) x0 + sigma noise, (N, C, h, w)."""
    channels, height, width = policy.latent_shape()
    if latents.dim() == 3:
        patches = latents.view(len(latents), height // 2, width // 2, channels, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(latents), channels, height, width)
    return latents * (1 - sigma) if policy.parts.denoiser == "unet" else latents


@variants_too
def test_a_rollout_draws_the_stock_pipelines_images(case: Case, policy: PipelinePolicy) -> None:
    drawn = []
    for rollout in case.rollouts():
        pipeline = case.stock()
        if rollout.solver != case.tiny.rollout["solver"]:
            pipeline.scheduler = pipeline_scheduler(rollout)
        images = ours(policy, rollout)
        assert images.shape == (2, 32, 64, 3)
        assert images.std() > 10
        assert differ(images, theirs(pipeline, policy, rollout)) <= case.tiny.tolerance
        drawn.append(images)
    assert not np.array_equal(drawn[0], drawn[1])


def test_one_condition_or_several_give_the_same(policy: PipelinePolicy) -> None:
    """Prompts of different lengths share a forward pass, guided and not."""
    x, time = policy.initial_latents([1, 2, 3, 4]) * 0.7, torch.tensor(600.0)
    one, other, negative = policy.encode("a cat"), policy.encode(PROMPT), policy.negative()
    for settings in ({}, {"guidance": 3.0, "negative": negative}):
        with torch.no_grad():
            both = policy.velocity(x, time, [one, other], **settings)
            alone = [policy.velocity(x[:2], time, one, **settings)]
            alone.append(policy.velocity(x[2:], time, other, **settings))
        torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert not torch.equal(both[:2], both[2:])
    with pytest.raises(ValueError, match="2 conditions for 3 samples"):
        policy.velocity(x[:3], time, [one, other])
    with pytest.raises(ValueError, match="needs a negative condition"):
        policy.velocity(x, time, one, guidance=3.0)


@variants_too
def test_an_update_lowers_the_loss_of_its_batch(case: Case) -> None:
    policy, rollout = case.load(), case.tiny.sampling(group_size=4)
    config = Config.model_validate(
        {
            "model": case.config().model_dump(),
            "prompts": {"source": "words"},
            "rollout": rollout.model_dump(),
            "rewards": [{"name": "ocr", "app": "ocr"}],
            "objective": {
                "beta": 5.0,
                "clip_range": None,
                "reference": "frozen",
                "timesteps": {"first": 2, "per_update": 2},
            },
            "learner": {"groups_per_step": 1, "micro_batch": 4, "learning_rate": 0.003},
        }
    )
    condition = policy.encode(PROMPT)
    latents = sample(policy, condition, None, (1, 2, 3, 4), rollout)
    group = TrainingGroup(
        ordinal=0, latents=latents, rewards={"ocr": [0.1, 0.9, 0.4, 0.7]}, condition=condition
    )
    updater = Updater(policy, config)
    # Step 0 twice: the same noise and timesteps, once before and once after an optimizer step.
    before, after = updater.step([group], 0), updater.step([group], 0)
    assert before.loss == pytest.approx(math.log(2) / 5.0)
    assert after.loss is not None
    assert after.loss < before.loss - 1e-5


@pytest.mark.parametrize("train", ["lora", "full"])
def test_bfloat16_trains_in_float32(case: Case, train: str) -> None:
    policy = case.load(dtype="bfloat16", train=train)
    assert {parameter.dtype for parameter in policy.trainable().values()} == {torch.float32}
    x = policy.initial_latents([1, 2])
    velocity = policy.velocity(x, torch.tensor(700.0), policy.encode(PROMPT))
    velocity.square().mean().backward()
    assert velocity.dtype == torch.float32
    gradients = [p.grad for p in policy.trainable().values() if p.grad is not None]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert len(gradients) > len(policy.trainable()) // 2


def test_text_encoders_may_stay_on_the_cpu(
    case: Case, policy: PipelinePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = policy.encode(PROMPT)
    for placement in ("cpu", "offload", "cached"):
        other = case.load(text_encoders=placement)
        moves: list[str] = []
        encoder = other.pipeline.text_encoder
        tensors = [*encoder.parameters(), *encoder.buffers()]
        before = [(id(tensor), tensor.data_ptr()) for tensor in tensors]
        monkeypatch.setattr(encoder, "to", lambda device, moves=moves: moves.append(str(device)))
        found = other.encode(PROMPT)
        # Its elements stay on the host all the time: nothing has to come back from a device.
        assert moves == ([] if placement == "cpu" else ["cpu"])
        assert [(id(t), t.data_ptr()) for t in (*encoder.parameters(), *encoder.buffers())] == before
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@variants_too
def test_default_targets_are_every_attention_projection(policy: PipelinePolicy) -> None:
    adapted = {name.split(".lora_")[0] for name in policy.trainable()}
    dual = ".attn2." if policy.parts.pipeline == "StableDiffusion3Pipeline" else "-"
    projections = {
        name.removesuffix(".base_layer")
        for name, module in policy.transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attn" in name and "lora" not in name and dual not in name
    }
    assert adapted == projections


def test_a_model_of_other_weights_is_another(case: Case, policy: PipelinePolicy) -> None:
    """Every part of the denoiser matters to the velocity: nothing of a condition is left out."""
    x, time = policy.initial_latents([1]), torch.tensor(600.0)
    condition = policy.encode(PROMPT)
    with torch.no_grad():
        velocity = policy.velocity(x, time, condition)
        for name, tensor in condition.items():
            if tensor.is_floating_point():
                other = condition | {name: tensor + 1}
                assert not torch.equal(policy.velocity(x, time, other), velocity), name
        assert not torch.equal(policy.velocity(x, torch.tensor(500.0), condition), velocity)
        other_policy = case.load()
        disturbed(other_policy.transformer, 9)
        assert not torch.equal(other_policy.velocity(x, time, condition), velocity)


def test_the_velocity_probe_tells_another_model(case: Case, policy: PipelinePolicy) -> None:
    def check(other: PipelinePolicy, expected: tuple[float, ...], tolerance: float | None = None) -> float:
        return check_probe(other, expected, tolerance=tolerance, weights="weights policy 0.1", here="a node")

    drawn = torch.get_rng_state()
    untrained = probe(policy)
    assert torch.equal(torch.get_rng_state(), drawn)
    generator = torch.Generator().manual_seed(5)
    published = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in policy.tensors().items()
    }
    expected = probe(policy, published)
    assert probe(policy) == untrained != expected

    def worker(**changes: Any) -> PipelinePolicy:
        loaded = load_policy(case.config(**changes), text_encoders=False, vae=False)
        loaded.install(published)
        return loaded

    other = worker()
    assert check(other, expected) == 0.0
    disturbed(other.transformer, 9)
    scaled = worker(lora=case.config().lora.model_copy(update={"alpha": 9.0}))
    for wrong in (other, scaled, worker(width=32)):
        with pytest.raises(VelocityDrift, match=r"weights policy 0\.1: the velocity on a node .*model\.path"):
            check(wrong, expected)
    with pytest.raises(VelocityDrift):
        check(worker(dtype="bfloat16"), expected, TOLERANCE[torch.float32])
    assert probe_error(expected, expected[:-1]) == probe_error(expected, (math.nan, *expected[1:])) == 2.0
