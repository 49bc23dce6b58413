"""Encoded prompts on disk are those of the text encoders, bit for bit, and no damaged file is trusted."""

from __future__ import annotations

import json
import logging
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from family_case import PROMPT, Case
from torch import Tensor

from policy import PolicyError, load_encoders, load_policy
from policy.condition_cache import ConditionCache
from policy.pipeline_policy import PipelinePolicy
from services.config import ModelConfig

Kept = dict[str, Tensor]


def same(one: Kept, other: Kept) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def cached(config: ModelConfig, directory: Path) -> PipelinePolicy:
    config = config.model_copy(update={"text_encoders": "cached"})
    return load_policy(config, text_encoders=True, vae=False, condition_cache=directory)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Weak references to each text encoder that is loaded into a pipeline."""
    from policy import text_encoders

    found: list[Any] = []
    load = text_encoders.load_pipeline

    def watched(parts: Any, *more: Any, **how: Any) -> Any:
        pipeline = load(parts, *more, **how)
        found.extend(weakref.ref(getattr(pipeline, name)) for name in parts.encoders)
        return pipeline

    monkeypatch.setattr(text_encoders, "load_pipeline", watched)
    return found


def test_conditions_of_every_family_are_the_uncached_ones(
    case: Case, policy: PipelinePolicy, tmp_path: Path, loads: list[Any]
) -> None:
    """Encoded beforehand by what loads no denoiser; then read by a policy that loads no encoder."""
    load_encoders(case.config(), tmp_path).prepare([PROMPT, "two cats"], negative=True)
    assert len(loads) == len(policy.parts.encoders)
    assert all(encoder() is None for encoder in loads)
    loads.clear()
    reader = cached(case.config(), tmp_path)
    for prompt in (PROMPT, "two cats"):
        assert same(reader.encode(prompt), policy.encode(prompt))
    assert same(reader.negative(), policy.negative())
    assert not loads
    assert all(getattr(reader.pipeline, name) is None for name in policy.parts.encoders)
    assert same(reader.encode("a prompt of its own"), policy.encode("a prompt of its own"))
    assert len(loads) == len(policy.parts.encoders)
    assert all(encoder() is None for encoder in loads)


def test_several_prompts_take_one_loading(
    model_config: ModelConfig, tmp_path: Path, loads: list[Any]
) -> None:
    policy, told = cached(model_config, tmp_path), []
    assert not policy.prepared("one")
    policy.prepare(["one", "two", "one"], done=told.append)
    assert told == ["one", "two"]
    assert policy.prepared("one")
    assert len(loads) == 3
    policy.prepare(["two", "one"], negative=False)
    assert len(loads) == 3


def test_what_cannot_be_encoded_leaves_no_encoder_behind(
    model_config: ModelConfig, tmp_path: Path, loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = cached(model_config, tmp_path)
    monkeypatch.setattr(policy, "_condition", lambda prompt, device: {"prompt_embeds": torch.zeros(1, 3)})
    with pytest.raises(PolicyError, match="prompt_embeds of width"):
        policy.encode("one")
    assert len(loads) == 3
    assert all(encoder() is None for encoder in loads)


def test_a_damaged_file_is_made_again(
    model_config: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = cached(model_config, tmp_path)
    expected = policy._encode("one")
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    policy._encode("two")
    (other,) = set(tmp_path.rglob("*.safetensors")) - {file}
    for damaged in (bytes(flipped), whole[:-5], b"", other.read_bytes()):
        file.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            assert same(policy._encode("one"), expected)
        assert f"{file} is damaged" in caplog.text
        caplog.clear()
        assert same(policy._encode("one"), expected)
        assert not caplog.records
    assert not list(tmp_path.rglob(".*.safetensors*"))


def test_a_cache_is_of_one_model(model_config: ModelConfig, tiny_sd3: Path, tmp_path: Path) -> None:
    """A copy of the files shares it; other encoders, dtypes and lengths do not."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_sd3, copy)

    def directory(**changes: Any) -> Path:
        policy = load_encoders(model_config.model_copy(update=changes), tmp_path / "cache")
        assert policy._cached is not None
        return policy._cached.cache.directory

    own = directory()
    assert directory(path=str(copy), height=64, train="lora") == own
    assert directory(dtype="bfloat16") != own
    assert directory(max_sequence_length=2) != own
    weights = copy / "text_encoder" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(bytes(changed))
    assert directory(path=str(copy)) != own


def test_dtypes_shapes_and_prompts_of_any_kind_survive(tmp_path: Path) -> None:
    cache = ConditionCache(tmp_path, {"model": "any"})
    condition = {
        "embeds": torch.randn(3, 4)[:, ::2].to(torch.bfloat16),
        "mask": torch.tensor([1, 0]),
        "none": torch.zeros(0, 2),
        "scalar": torch.tensor(0.1),
    }
    for prompt in ("", None, "null", 'a "sign"\n', "\U0001f600 caf\u00e9"):
        assert not cache.has(prompt)
        assert cache.read(prompt) is None
        cache.write(prompt, condition)
        found = cache.read(prompt)
        assert found is not None
        assert same(found, condition)
    assert json.loads((cache.directory / "model.json").read_text()) == {"model": "any"}
    assert len(list(cache.directory.rglob("*.safetensors"))) == 5
