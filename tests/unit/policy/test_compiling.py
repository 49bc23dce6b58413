"""Compiled blocks: the same velocities and gradients, with whatever weights and adapters, kept on disk."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from family_case import PROMPT, Case
from torch import Tensor, nn

from policy import PolicyError, load_policy
from policy.compiling import PLACE, compile_blocks, compile_on_gpu
from policy.pipeline_policy import PipelinePolicy

TOLERANCE = 1e-5
"""Relative, of float32 added up in another order."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place))
    torch.compiler.reset()
    return place


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def twins(case: Case, **changes: Any) -> tuple[PipelinePolicy, PipelinePolicy]:
    """Two policies with the same trained weights, of which the second is compiled."""
    plain, compiled = case.load(**changes), case.load(**changes)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in plain.tensors().items()
    }
    compile_blocks(compiled.transformer)
    for policy in (plain, compiled):
        policy.install(weights)
    return plain, compiled


def velocities(policy: PipelinePolicy, samples: int, **guided: Any) -> Tensor:
    noise = policy.initial_latents(range(samples)) * 0.7
    with torch.no_grad():
        return policy.velocity(noise, torch.tensor(500.0), policy.encode(PROMPT), **guided)


def gradients(policy: PipelinePolicy) -> Tensor:
    noise = policy.initial_latents([7, 8]) * 0.7
    loss = policy.velocity(noise, torch.tensor(500.0), policy.encode(PROMPT)).square().mean()
    found = torch.autograd.grad(loss, list(policy.trainable().values()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sana"], indirect=True)
def test_compiled_blocks_compute_the_same_and_are_kept(case: Case, cache: Path) -> None:
    plain, compiled = twins(case)
    assert off(velocities(compiled, 2), velocities(plain, 2)) < TOLERANCE
    assert list(cache.rglob("*.cpp")), "what was compiled is not kept"


@pytest.mark.slow
@pytest.mark.parametrize("train", ["lora", "full"])
def test_whatever_a_run_does_with_a_model_is_the_same_when_it_is_compiled(
    case: Case, train: str, cache: Path
) -> None:
    plain, compiled = twins(case, train=train)
    guided = {"guidance": 2.0, "negative": plain.negative()}
    assert off(velocities(compiled, 4, **guided), velocities(plain, 4, **guided)) < TOLERANCE
    assert off(velocities(compiled, 2), velocities(plain, 2)) < TOLERANCE
    with ExitStack() as stack:
        for policy in (plain, compiled):
            stack.enter_context(policy.base())
        assert off(velocities(compiled, 2), velocities(plain, 2)) < TOLERANCE
    others = {name: tensor + 0.05 for name, tensor in plain.tensors().items()}
    with plain.swapped(others), compiled.swapped({name: tensor.clone() for name, tensor in others.items()}):
        assert off(velocities(compiled, 2), velocities(plain, 2)) < TOLERANCE
    assert off(gradients(compiled), gradients(plain)) < 10 * TOLERANCE
    for policy in (plain, compiled):
        policy.checkpoint_gradients()
    assert off(gradients(compiled), gradients(plain)) < 10 * TOLERANCE


def sd3_velocity(blocks: int) -> Tensor:
    """Of a compiled model of so many blocks."""
    model = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=blocks,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    compile_blocks(model)
    with torch.no_grad():
        found: Tensor = model(
            hidden_states=torch.ones(2, 4, 4, 4),
            encoder_hidden_states=torch.ones(2, 3, 16),
            pooled_projections=torch.ones(2, 8),
            timestep=torch.ones(2),
        ).sample
    return found


def test_a_deeper_model_compiles_no_more(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    through_inductor = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda block, **how: through_inductor(block, **how, backend=backend)
    )
    assert sd3_velocity(4).shape == (2, 4, 4, 4)
    # The last block, which has no text to pass on, is another kind.
    assert len(compiled) == 2
    sd3_velocity(12)
    assert len(compiled) == 2


@pytest.mark.parametrize("case", ["sana"], indirect=True)
def test_a_model_is_compiled_where_it_is_asked_for(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[nn.Module, torch.device]] = []
    monkeypatch.setattr("policy.pipeline_policy.compile_on_gpu", lambda *given: asked.append(given))
    load_policy(case.config(), text_encoders=False, vae=False)
    assert asked == []
    policy = load_policy(case.config(compile=True), text_encoders=False, vae=False)
    assert asked == [(policy.transformer, policy.device)]
    compile_on_gpu(policy.transformer, torch.device("cuda"))
    assert any(module._compiled_call_impl is not None for module in policy.transformer.modules())


@pytest.mark.parametrize("case", ["sana"], indirect=True)
def test_on_a_cpu_nothing_is_compiled(case: Case) -> None:
    policy = load_policy(case.config(compile=True), text_encoders=False, vae=False)
    assert all(module._compiled_call_impl is None for module in policy.transformer.modules())


def test_a_model_without_blocks_is_refused(cache: Path) -> None:
    with pytest.raises(PolicyError, match=r"model.compile: a Linear has no repeated blocks"):
        compile_blocks(nn.Linear(2, 2))


def test_without_a_place_of_its_own_the_cache_is_the_users(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)

    class Block(nn.Linear):
        pass

    class Model(nn.Sequential):
        _repeated_blocks = ("Block",)

    compile_blocks(Model(Block(2, 2)))
    found = Path(os.environ.pop("TORCHINDUCTOR_CACHE_DIR"))
    assert found == PLACE.expanduser() and found.is_dir() and found.stat().st_mode & 0o077 == 0
