"""What headers tell of a model before any weight is read; what they leave open is not refused."""

from __future__ import annotations

import json
import math
import resource
import shutil
from pathlib import Path
from typing import Any

import diffusers
import psutil
import pytest
import torch
import transformers
from diffusers import FluxTransformer2DModel
from family_case import Case
from safetensors.torch import load_file, save_file
from tiny_pipelines import TINY, VARIANTS

from policy import PolicyError, load_policy
from policy.component_files import DENOISER_FILE, check_vocabulary, check_weights
from policy.registry import check_files
from policy.whole import check_whole
from services.config import ModelConfig

GIB = 1024**3
each_kind = pytest.mark.parametrize("case", list(TINY | VARIANTS), indirect=True)
on_sd3 = pytest.mark.parametrize("case", ["sd3.5-medium"], indirect=True)


@pytest.fixture
def copy(case: Case, tmp_path: Path) -> Path:
    """To break."""
    return shutil.copytree(case.directory, tmp_path / "model")


def loads(config: ModelConfig) -> dict[str, str]:
    """It does; which components headers do not tell of."""
    unclear = check_files(config).unclear
    load_policy(config, text_encoders=True, vae=True)
    return unclear


def file_of(component: Path) -> Path:
    (file,) = component.glob("*.safetensors")
    return file


def sparse(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file with the header of such weights in bfloat16, and nothing of them on the disk."""
    header, end = {}, 0
    for weight, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[weight] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as made:
        made.write(len(text).to_bytes(8, "little") + text)
        made.truncate(8 + len(text) + end)


@each_kind
def test_a_whole_model_of_every_kind_is_let_pass(case: Case) -> None:
    checked = check_files(case.config())
    assert sorted(checked.files) == sorted(case.directory.rglob("*.safetensors"))
    assert not checked.unclear


@each_kind
def test_shards_and_files_that_nobody_reads_are_let_pass(case: Case, copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    shards = 0
    for file in list(copy.rglob("*.safetensors")):
        component = file.parent
        library, kind = index[component.name]
        model = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
        model = model.from_pretrained(component)
        file.unlink()
        model.save_pretrained(component, max_shard_size="20KB")
        shards += len(list(component.glob("*-of-*.safetensors")))
        for other in (".fp16.safetensors", ".bin"):
            (component / f"{file.stem}{other}").write_bytes(b"none of a model")
    assert shards > 4
    config = case.config(path=str(copy))
    assert loads(config) == {}
    assert len(check_files(config).files) >= shards


@each_kind
def test_other_shapes_are_named_in_every_component(case: Case, copy: Path) -> None:
    for file in sorted(copy.rglob("*.safetensors")):
        before, weights = file.read_bytes(), load_file(file)
        # Not a tied one, which has two names.
        weight = next(name for name in sorted(weights) if ".0." in name and weights[name].dim() > 1)
        wide = tuple(weights[weight].shape)
        save_file(weights | {weight: weights[weight][:1].clone()}, file, metadata={"format": "pt"})
        with pytest.raises(PolicyError) as refused:
            check_files(case.config(path=str(copy)))
        text = str(refused.value)
        assert f"the {file.parent.name} is not what its config.json describes: in {file} " in text
        assert weight.rpartition("layers.")[2] in text
        assert f" is {(1, *wide[1:])}, expected {wide}; config.json must be the one " in text
        file.write_bytes(before)


@on_sd3
def test_a_wrong_shape_in_a_shard_is_named_with_the_shard(case: Case, copy: Path) -> None:
    component = copy / "transformer"
    file_of(component).unlink()
    model = diffusers.SD3Transformer2DModel.from_pretrained(case.directory / "transformer")
    model.save_pretrained(component, max_shard_size="8KB")
    shard = sorted(component.glob("*.safetensors"))[2]
    weights = load_file(shard)
    weight = next(iter(weights))
    save_file(weights | {weight: torch.zeros(3, 5, 7)}, shard, metadata={"format": "pt"})
    with pytest.raises(PolicyError, match=f"in {shard} {weight} is ") as refused:
        check_files(case.config(path=str(copy)))
    assert "is (3, 5, 7), expected (" in str(refused.value)


@on_sd3
def test_old_names_of_attention_in_an_autoencoder_are_let_pass(case: Case, copy: Path) -> None:
    file = file_of(copy / "vae")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name: str) -> str:
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        return name

    weights = {renamed(name): tensor for name, tensor in load_file(file).items()}
    assert any(".query." in name for name in weights)
    save_file(weights, file, metadata={"format": "pt"})
    assert loads(case.config(path=str(copy))) == {}


@on_sd3
def test_of_what_headers_do_not_tell_nothing_is_refused(case: Case, copy: Path) -> None:
    def changed(component: str, **settings: Any) -> None:
        config = copy / component / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | settings))

    # As some have it, and it means nothing.
    changed("text_encoder_2", quantization_config=None)
    # Packed weights have other shapes, and more of them.
    changed("text_encoder", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    file = file_of(copy / "text_encoder")
    packed = {name: torch.zeros(8, 1, dtype=torch.uint8) for name in load_file(file)}
    save_file(packed, file, metadata={"format": "pt"})
    changed("vae", act_fn="of tomorrow")
    unclear = check_files(case.config(path=str(copy))).unclear
    assert sorted(unclear) == ["text_encoder", "vae"]
    assert unclear["text_encoder"] == "its config.json has a quantization_config"
    assert "of tomorrow" in unclear["vae"]


@on_sd3
def test_a_component_without_configuration_is_named(case: Case, copy: Path) -> None:
    config = copy / "vae" / "config.json"
    config.unlink()
    with pytest.raises(PolicyError, match=f"the vae cannot be loaded: .*{config}"):
        check_files(case.config(path=str(copy)))


@on_sd3
def test_a_component_that_is_not_in_the_pipeline_is_named(case: Case, copy: Path) -> None:
    index = copy / "model_index.json"
    settings = json.loads(index.read_text())
    index.write_text(json.dumps(settings | {"text_encoder_2": [None, None]}))
    with pytest.raises(PolicyError, match="has no text_encoder_2; a StableDiffusion3Pipeline needs "):
        check_files(case.config(path=str(copy)))
    # An SD3 without T5 is one.
    index.write_text(json.dumps(settings | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}))
    assert not check_files(case.config(path=str(copy))).unclear


def test_words_in_another_file_are_enough(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    check_vocabulary("the tokenizer", tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    told = f"no word is in {tmp_path / 'tokenizer.json'} or {tmp_path / 'vocab.json'}"
    with pytest.raises(PolicyError, match=told):
        check_vocabulary("the tokenizer", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    check_vocabulary("the tokenizer", tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    added = {"content": "a", "special": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {}, "added_tokens": [added]}))
    check_vocabulary("the tokenizer", tmp_path)


def test_a_file_that_is_larger_than_memory_is_looked_at(tmp_path: Path) -> None:
    shape = (4, psutil.virtual_memory().total)
    sparse(tmp_path / DENOISER_FILE, {"weight": shape})
    assert check_weights("the vae", tmp_path, DENOISER_FILE).shapes == {"weight": shape}


def test_a_transformer_as_large_as_published_ones_takes_no_memory(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    model.save_config(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sparse(tmp_path / DENOISER_FILE, shapes)
    assert (tmp_path / DENOISER_FILE).stat().st_size > 20 * GIB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, unclear = check_whole("the transformer", FluxTransformer2DModel, tmp_path)
    assert not unclear
    lost = shapes.pop("single_transformer_blocks.37.proj_out.weight")
    sparse(tmp_path / DENOISER_FILE, shapes)
    with pytest.raises(PolicyError, match=r"lacks 1 weight: single_transformer_blocks\.37\.proj_out\.weight"):
        check_whole("the transformer", FluxTransformer2DModel, tmp_path)
    assert lost == (3072, 15360)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < GIB
