"""The SD3 family computes what the stock pipeline computes; weights go in and out whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policy import InstallError, Policy, PolicyError, load_policy
from policy.loading import align
from services.config import LoraConfig, ModelConfig
from services.config_file import load_config
from services.safetensors_layout import ALIGNMENT_BYTES
from tests.pickled_weights import pickle_weights

PROMPT = 'a sign that says "K7QX"'


def lora(config: ModelConfig, **changes: Any) -> ModelConfig:
    return config.model_copy(update={"train": "lora", "lora": LoraConfig(rank=4, alpha=8, **changes)})


def stock(config: ModelConfig) -> Any:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(config.path)
    pipeline.set_progress_bar_config(disable=True)
    align(pipeline)
    return pipeline


def velocity(policy: Policy, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return policy.velocity(
            policy.initial_latents([1, 2]), torch.tensor(700.0), policy.encode(PROMPT), **options
        )


def disturb(policy: Policy, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture
def policy(model_config: ModelConfig) -> Policy:
    return load_policy(model_config, text_encoders=True, vae=True)


@pytest.fixture
def lora_policy(model_config: ModelConfig) -> Policy:
    return load_policy(lora(model_config), text_encoders=True, vae=True)


def test_initial_latents_are_the_stock_pipelines(policy: Policy, model_config: ModelConfig) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 9)]
    expected = stock(model_config).prepare_latents(
        2, 4, 32, 64, torch.float32, torch.device("cpu"), generators
    )
    assert torch.equal(policy.initial_latents([3, 9]), expected)


def test_encode_is_the_stock_pipelines_and_is_kept(policy: Policy, model_config: ModelConfig) -> None:
    embeds, _, pooled, _ = stock(model_config).encode_prompt(
        PROMPT, None, None, do_classifier_free_guidance=False, max_sequence_length=1
    )
    condition = policy.encode(PROMPT)
    assert torch.equal(condition["prompt_embeds"], embeds[0])
    assert torch.equal(condition["pooled"], pooled[0])
    assert policy.encode(PROMPT)["pooled"] is condition["pooled"]
    assert not torch.equal(policy.negative()["pooled"], condition["pooled"])


def test_kept_conditions_are_bounded(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policy.base.CONDITION_CACHE_BYTES", 9000)
    first = policy.encode("first")
    for word in range(20):
        policy.encode(f'a sign that says "{word}"')
    assert sum(t.nbytes for c in policy._conditions.values() for t in c.values()) <= 9000
    assert policy.encode("first")["pooled"] is not first["pooled"]


def test_several_conditions_serve_their_own_samples(policy: Policy) -> None:
    x, timestep = policy.initial_latents([1, 2, 3, 4]), torch.tensor(500.0)
    one, other = policy.encode(PROMPT), policy.encode('a sign that says "ZZ9"')
    with torch.no_grad():
        both = policy.velocity(x, timestep, [one, other])
        alone = torch.cat([policy.velocity(x[:2], timestep, one), policy.velocity(x[2:], timestep, other)])
    torch.testing.assert_close(both, alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="2 conditions for 3 samples"):
        policy.velocity(x[:3], timestep, [one, other])


def test_guidance_is_the_stock_formula(policy: Policy) -> None:
    with torch.no_grad():
        x, timestep = policy.initial_latents([1, 2]), torch.tensor(700.0)
        away = policy.velocity(x, timestep, policy.negative())
    toward = velocity(policy)
    guided = velocity(policy, guidance=4.0, negative=policy.negative())
    torch.testing.assert_close(guided, away + 4 * (toward - away), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs a negative condition"):
        velocity(policy, guidance=4.0)


def test_decode_is_the_stock_pipelines(policy: Policy, model_config: ModelConfig) -> None:
    latents = torch.randn(3, 4, 8, 16, generator=torch.Generator().manual_seed(0)) * 2
    pipeline = stock(model_config)
    with torch.no_grad():
        raw = pipeline.vae.decode(latents / 0.7 + 0.1, return_dict=False)[0]
    expected = np.stack([np.asarray(i) for i in pipeline.image_processor.postprocess(raw, output_type="pil")])
    images = policy.decode(latents, batch=3)
    assert images.dtype == np.uint8
    assert images.shape == (3, 32, 64, 3)
    assert np.array_equal(images, expected)
    assert np.abs(policy.decode(latents, batch=2).astype(int) - expected).max() <= 1


def test_full_trains_every_weight_and_no_buffer(policy: Policy) -> None:
    names = set(policy.trainable())
    assert names == {name for name, _ in policy.transformer.named_parameters()}
    assert "pos_embed.pos_embed" not in names
    assert all(parameter.requires_grad for parameter in policy.trainable().values())


def test_lora_starts_as_the_base_and_alike_everywhere(lora_policy: Policy, model_config: ModelConfig) -> None:
    again = load_policy(lora(model_config), text_encoders=False, vae=False)
    other = load_policy(lora(model_config), text_encoders=False, vae=False, seed=1)
    base = load_policy(model_config, text_encoders=True, vae=False)
    assert torch.equal(velocity(lora_policy), velocity(base))
    mine, same, differs = lora_policy.tensors(), again.tensors(), other.tensors()
    assert all(torch.equal(mine[name], same[name]) for name in mine)
    gaussian = [name for name in mine if ".lora_A." in name]
    assert all(not torch.equal(mine[name], differs[name]) for name in gaussian)
    spread = torch.cat([mine[name].flatten() for name in gaussian]).std()
    assert float(spread) == pytest.approx(1 / 4, rel=0.1)


def test_lora_target_that_matches_nothing_is_named(model_config: ModelConfig) -> None:
    with pytest.raises(PolicyError, match=r"'attn\.to_z'.*attn\.to_q"):
        load_policy(lora(model_config, targets=("attn.to_z",)), text_encoders=False, vae=False)


def test_bfloat16_keeps_trained_weights_in_float32(model_config: ModelConfig) -> None:
    for train in ("lora", "full"):
        config = lora(model_config).model_copy(update={"dtype": "bfloat16", "train": train})
        policy = load_policy(config, text_encoders=True, vae=True)
        assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
        out = policy.velocity(policy.initial_latents([1, 2]), torch.tensor(700.0), policy.encode(PROMPT))
        out.sum().backward()
        assert out.dtype == torch.float32
        assert {p.grad.dtype for p in policy.trainable().values() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("kind", ["policy", "lora_policy"])
def test_install_binds_all_or_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    policy: Policy = request.getfixturevalue(kind)
    before, identities = policy.tensors(), {n: id(p) for n, p in policy.trainable().items()}
    changed = {name: tensor + 1 for name, tensor in before.items()}
    first, *_, last = sorted(changed)
    missing = {name: tensor for name, tensor in changed.items() if name != last}
    with pytest.raises(InstallError, match=f"missing {last}"):
        policy.install(missing)
    with pytest.raises(InstallError, match="unknown stranger"):
        policy.install({**changed, "stranger": torch.zeros(1)})
    with pytest.raises(InstallError, match=f"{first} is \\(7,\\), expected"):
        policy.install({**changed, first: torch.zeros(7)})
    with pytest.raises(InstallError, match=r"torch\.int64"):
        policy.install({**changed, first: changed[first].long()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.tensors().items())
    assert policy.install(changed) == len(before)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in policy.tensors().items())
    assert {n: id(p) for n, p in policy.trainable().items()} == identities


@pytest.mark.parametrize("kind", ["policy", "lora_policy"])
def test_swapped_and_base_restore_exactly(kind: str, request: pytest.FixtureRequest) -> None:
    policy: Policy = request.getfixturevalue(kind)
    base = velocity(policy)
    start = policy.tensors()
    disturb(policy)
    now, tensors = velocity(policy), policy.tensors()
    addresses = {name: parameter.data_ptr() for name, parameter in policy.trainable().items()}
    assert not torch.equal(now, base)
    with policy.swapped(start):
        assert torch.equal(velocity(policy), base)
        assert next(iter(policy.trainable().values())).data_ptr() == next(iter(start.values())).data_ptr()
    with policy.base():
        assert torch.equal(velocity(policy), base)
    with pytest.raises(RuntimeError, match="boom"), policy.base():
        raise RuntimeError("boom")
    with pytest.raises(RuntimeError, match="boom"), policy.swapped(start):
        raise RuntimeError("boom")
    assert torch.equal(velocity(policy), now)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in policy.tensors().items())
    assert {name: p.data_ptr() for name, p in policy.trainable().items()} == addresses
    assert all(parameter.requires_grad for parameter in policy.trainable().values())


@pytest.mark.parametrize("kind", ["policy", "lora_policy"])
def test_base_inside_a_graph_leaves_its_gradient_alone(kind: str, request: pytest.FixtureRequest) -> None:
    policy: Policy = request.getfixturevalue(kind)
    disturb(policy)
    x, timestep, condition = policy.initial_latents([1]), torch.tensor(300.0), policy.encode(PROMPT)

    def gradients(interrupted: bool) -> list[torch.Tensor]:
        loss = policy.velocity(x, timestep, condition).square().mean()
        if interrupted:
            with torch.no_grad(), policy.base():
                policy.velocity(x, timestep, condition)
        return list(torch.autograd.grad(loss, list(policy.trainable().values()), allow_unused=True))

    for plain, interrupted in zip(gradients(False), gradients(True), strict=True):
        assert plain is interrupted is None or torch.equal(plain, interrupted)


def test_base_that_was_not_kept_is_an_error(model_config: ModelConfig) -> None:
    policy = load_policy(model_config, text_encoders=False, vae=False, base=False)
    with pytest.raises(InstallError, match="base=True"), policy.base():
        pass


def test_parts_that_were_not_loaded_are_named(model_config: ModelConfig) -> None:
    policy = load_policy(model_config, text_encoders=False, vae=False)
    assert policy.latent_shape() == (4, 8, 16)
    with pytest.raises(PolicyError, match="text_encoders=True"):
        policy.encode(PROMPT)
    with pytest.raises(PolicyError, match="vae=True"):
        policy.decode(policy.initial_latents([1]), 1)


def test_loading_says_what_is_wrong(tiny_sd3: Path, model_config: ModelConfig, tmp_path: Path) -> None:
    def load(**changes: Any) -> None:
        load_policy(model_config.model_copy(update=changes), text_encoders=True, vae=True)

    def broken(name: str, **index: Any) -> str:
        copy = tmp_path / name
        shutil.copytree(tiny_sd3, copy)
        file = copy / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | index))
        return str(copy)

    with pytest.raises(PolicyError, match="no such directory"):
        load(path=str(tmp_path / "nowhere"))
    with pytest.raises(PolicyError, match="no such directory"):
        load(path="quickstart/modle")
    with pytest.raises(PolicyError, match=r"no model_index\.json"):
        load(path=str(tiny_sd3 / "vae"))
    with pytest.raises(
        PolicyError, match=r"'FluxPipe' is not supported; supported: .*StableDiffusion3Pipeline"
    ):
        load(path=broken("family", _class_name="FluxPipe"))
    with pytest.raises(PolicyError, match="found FluxTransformer2DModel"):
        load(path=broken("class", transformer=["diffusers", "FluxTransformer2DModel"]))
    without = broken("component")
    shutil.rmtree(Path(without) / "vae")
    with pytest.raises(PolicyError, match="names vae"):
        load(path=without)
    empty = broken("weights")
    (Path(empty) / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(PolicyError, match="cannot be loaded"):
        load(path=empty)
    with pytest.raises(PolicyError, match="multiples of 8"):
        load(height=36)
    with pytest.raises(PolicyError, match=r"height 32 and model\.width 72: .* at most 64 pixels .* is 8"):
        load(width=72)
    with pytest.raises(PolicyError, match="CUDA devices"):
        load(device="cuda:97")


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("transformer", "diffusion_pytorch_model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
    ],
)
def test_pickled_weights_are_refused(
    tiny_sd3: Path, model_config: ModelConfig, tmp_path: Path, part: str, file: str
) -> None:
    copy = shutil.copytree(tiny_sd3, tmp_path / "pickled")
    pickle_weights(copy / part)
    config = model_config.model_copy(update={"path": str(copy)})
    with pytest.raises(PolicyError, match=f"cannot be loaded: .*no file named {file}.* {copy / part}"):
        load_policy(config, text_encoders=True, vae=True)


def test_weights_lie_as_torch_lays_memory_wherever_they_are_in_their_file() -> None:
    """Else a model that has moved to other memory would compute other last digits."""
    policy = load_policy(load_config("quickstart", []).model, text_encoders=True, vae=True)
    held = list(policy.held())
    assert held and all(tensor.data_ptr() % ALIGNMENT_BYTES == 0 for tensor in held)
