"""Gradient checkpointing: the same gradient for less memory, whatever adapters the forward pass had."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from family_case import PROMPT, Case
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from learner.objectives.base import TrainingGroup
from learner.update import Updater
from policy import PolicyError, load_policy
from policy.pipeline_policy import PipelinePolicy
from services.config import Config, LoraConfig, ModelConfig


@dataclasses.dataclass
class Pass:
    gradients: list[Tensor]
    kept_bytes: int
    """What the backward pass needs of the forward pass, weights left out."""
    forward_flops: int
    flops: int


def one_pass(policy: PipelinePolicy) -> Pass:
    stay = {tensor.untyped_storage().data_ptr() for tensor in policy.transformer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in stay:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, condition = policy.initial_latents([1, 2]) * 0.7, policy.encode(PROMPT)
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = policy.velocity(x, torch.tensor(600.0), condition).square().mean()
        forward = counter.get_total_flops()
        gradients = torch.autograd.grad(loss, list(policy.trainable().values()), materialize_grads=True)
    return Pass(list(gradients), sum(kept.values()), forward, counter.get_total_flops())


def disturb(policy: PipelinePolicy) -> None:
    """Adapters start without any effect: a test of them needs one."""
    policy.install({name: tensor + 0.1 for name, tensor in policy.tensors().items()})


def test_the_gradient_is_the_same_and_less_is_kept(case: Case) -> None:
    policy = case.load()
    disturb(policy)
    plain = one_pass(policy)
    policy.checkpoint_gradients()
    found = one_pass(policy)
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(found.gradients, plain.gradients, strict=True)
    )
    assert any(bool(gradient.any()) for gradient in found.gradients)
    assert found.kept_bytes < 0.7 * plain.kept_bytes
    assert found.forward_flops == plain.forward_flops
    assert 0.2 * plain.forward_flops < found.flops - plain.flops <= plain.forward_flops


def test_a_block_is_computed_again_with_its_adapters_as_they_were(model_config: ModelConfig) -> None:
    """The backward pass finds the adapters the other way round."""
    lora = {"train": "lora", "lora": LoraConfig(rank=2, alpha=4)}
    policy = load_policy(model_config.model_copy(update=lora), text_encoders=True, vae=False)
    disturb(policy)
    condition, start, time = policy.encode(PROMPT), policy.initial_latents([1, 2]), torch.tensor(600.0)

    def gradient(*, off: bool) -> Tensor:
        x = start.clone().requires_grad_()
        with policy.base() if off else nullcontext():
            loss = policy.velocity(x, time, condition).square().mean()
        with nullcontext() if off else policy.base():
            loss.backward()
        assert x.grad is not None
        return x.grad

    expected = [gradient(off=off) for off in (False, True)]
    policy.checkpoint_gradients()
    assert torch.equal(gradient(off=False), expected[0])
    assert torch.equal(gradient(off=True), expected[1])
    assert not torch.equal(*expected)


def test_other_weights_in_the_backward_pass_are_refused(model_config: ModelConfig) -> None:
    policy = load_policy(model_config, text_encoders=True, vae=False)
    policy.checkpoint_gradients()
    x, condition = policy.initial_latents([1]), policy.encode(PROMPT)
    other = {name: tensor + 1 for name, tensor in policy.tensors().items()}
    loss = policy.velocity(x, torch.tensor(600.0), condition).square().mean()
    with policy.swapped(other), pytest.raises(RuntimeError, match="other trained tensors"):
        loss.backward()
    with policy.swapped(other):
        policy.velocity(x, torch.tensor(600.0), condition).square().mean().backward()


def updated(model: ModelConfig, objective: dict[str, Any], **learner: Any) -> dict[str, Tensor]:
    """The trained weights after two updates of DGPO."""
    config = Config.model_validate(
        {
            "model": model.model_dump(),
            "prompts": {"source": "words"},
            "rollout": {"group_size": 4, "steps": 4},
            "rewards": [{"name": "ocr", "app": "ocr"}],
            "objective": {"beta": 5.0, "timesteps": {"first": 3, "per_update": 2}} | objective,
            "learner": {"groups_per_step": 1, "micro_batch": 4, "learning_rate": 0.01} | learner,
        }
    )
    policy = load_policy(model, text_encoders=True, vae=False)
    updater = Updater(policy, config)
    for step in range(2):
        latents = torch.randn(4, *policy.latent_shape(), generator=torch.Generator().manual_seed(step))
        scores = {"ocr": [0.1, 0.9, 0.4, 0.7]}
        updater.step([TrainingGroup(step, latents, scores, policy.encode(PROMPT))], step)
    return policy.tensors()


@pytest.mark.parametrize("train", ["lora", "full"])
def test_updates_are_the_same(train: str, model_config: ModelConfig) -> None:
    """With passes of the base and of the reference between forward and backward passes, and offloading."""
    model = model_config.model_copy(update={"train": train, "lora": LoraConfig(rank=2, alpha=4)})
    for objective, learner in (
        ({"kl": 0.1, "clip_range": 1e-3}, {"micro_batch": 2}),
        ({"kl": 0.1, "clip_range": 1e-3}, {"micro_batch": 2, "activation_offload": True}),
        ({"reference": "frozen", "clip_range": None}, {"micro_batch": 1}),
    ):
        expected = updated(model, objective, **learner)
        found = updated(model, objective, gradient_checkpointing=True, **learner)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_model_without_blocks_is_refused(model_config: ModelConfig) -> None:
    policy = load_policy(model_config, text_encoders=False, vae=False)
    policy.transformer = torch.nn.Linear(2, 2)
    with pytest.raises(PolicyError, match="gradient_checkpointing: a Linear cannot"):
        policy.checkpoint_gradients()
