"""A model that lacks something, or has too much, or no numbers, is refused: where and what is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from family_case import PROMPT, Case
from safetensors.torch import load_file, save_file
from tiny_pipelines import TINY
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from policy import PolicyError, load_encoders, load_policy
from policy.loading import CheckedFiles
from policy.pipeline_policy import PipelinePolicy
from policy.registry import check_files, read_family
from services.config import ModelConfig

Tensors = dict[str, Tensor]
LAYER = re.compile(r"(?<=\.)0(?=\.)")
each_family = pytest.mark.parametrize(
    "case", [name for name in TINY if name != "flux-schnell"], indirect=True
)


@pytest.fixture
def copy(case: Case, tmp_path: Path) -> Path:
    """Of a family's tiny pipeline, to break."""
    return shutil.copytree(case.directory, tmp_path / "model")


@pytest.fixture(scope="session")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """For what no family has to itself."""
    directory = tmp_path_factory.mktemp("whole") / "sd3"
    TINY["sd3.5-medium"].build(directory)
    return Case("sd3.5-medium", TINY["sd3.5-medium"], directory)


@pytest.fixture
def sd3_copy(sd3: Case, tmp_path: Path) -> Path:
    return shutil.copytree(sd3.directory, tmp_path / "model")


def file_of(component: Path) -> Path:
    (file,) = component.glob("*.safetensors")
    return file


def change(file: Path, made: Callable[[Tensors], Tensors]) -> bytes:
    """Write other weights; what was there is returned."""
    before = file.read_bytes()
    save_file(made(load_file(file)), file, metadata={"format": "pt"})
    return before


def refuses(case: Case, copy: Path, *told: str, unseen: bool = False, foreseen: tuple[str, ...] = ()) -> None:
    """When it is loaded and, in the same words, before anything is.

    Args:
        unseen: headers do not tell it.
        foreseen: the words before, where diffusers has its own.
    """
    config = case.config(path=str(copy))
    with pytest.raises(PolicyError) as refused:
        load_policy(config, text_encoders=True, vae=True)
    assert all(part in str(refused.value) for part in told), refused.value
    if unseen:
        assert foresees(config).files
        return
    with pytest.raises(PolicyError) as before:
        foresees(config)
    assert all(part in str(before.value) for part in foreseen or (str(refused.value),)), before.value


def foresees(config: ModelConfig) -> CheckedFiles:
    """In the order of a driver."""
    read_family(config)
    return check_files(config)


def some_weight(weights: Tensors) -> str:
    """Not a tied one."""
    return next(key for key in sorted(weights) if LAYER.search(key) and weights[key].dim() > 1)


@each_family
def test_a_missing_weight_is_named_in_every_component(case: Case, policy: PipelinePolicy, copy: Path) -> None:
    for name in policy.parts.classes:
        file = file_of(copy / name)
        lost = some_weight(load_file(file))
        before = change(file, lambda all_, lost=lost: {k: t for k, t in all_.items() if k != lost})
        refuses(
            case, copy, f"the {name} is not whole: {file} lacks 1 weight: ", lost.rpartition("layers.")[2]
        )
        file.write_bytes(before)


@each_family
def test_what_random_weights_or_none_would_encode_is_never_kept(
    case: Case, policy: PipelinePolicy, copy: Path, tmp_path: Path
) -> None:
    """The velocity probe would not see it, and a condition cache would have it for good."""
    first = next(iter(policy.parts.encoders))
    file = file_of(copy / first)
    whole = load_file(file)
    change(file, lambda _: {k: t for k, t in whole.items() if "v_proj" not in k})
    encoders = load_encoders(case.config(path=str(copy)), tmp_path / "conditions")
    with pytest.raises(PolicyError, match=f"the {first} is not whole: .*v_proj.weight"):
        encoders.prepare([PROMPT])
    change(file, lambda _: {k: t * float("nan") for k, t in whole.items()})
    encoders = load_encoders(case.config(path=str(copy)), tmp_path / "conditions")
    with pytest.raises(PolicyError, match=f"the {first} has weights that are not finite"):
        encoders.prepare([PROMPT])
    assert not list((tmp_path / "conditions").rglob("*.safetensors"))


@each_family
def test_a_layer_that_the_configuration_does_not_have_is_named(
    case: Case, policy: PipelinePolicy, copy: Path
) -> None:
    for name in policy.parts.classes:
        file = file_of(copy / name)
        weights = load_file(file)
        first = next(key for key in weights if LAYER.search(key))
        more = LAYER.sub("77", first, count=1)
        before = change(file, lambda all_, first=first, more=more: {**all_, more: all_[first].clone()})
        told = f"the {name} is not what its config.json describes: {file} also holds 1 weight: "
        refuses(case, copy, told, "77")
        file.write_bytes(before)
    config = copy / policy.parts.denoiser / "config.json"
    settings = json.loads(config.read_text())
    if "num_layers" in settings:
        # The last layer of SD3 is of another form, so that there shapes differ too.
        shapes = "dual_attention_layers" in settings
        for layers, told in ((1, "is not whole: "), (-1, "is not what its config.json describes: ")):
            config.write_text(json.dumps(settings | {"num_layers": settings["num_layers"] + layers}))
            where = str(copy / "transformer"), "transformer_blocks."
            foreseen = (f"the transformer {told}", *where)
            refuses(
                *(case, copy, f"the transformer {'cannot be loaded: ' if shapes else told}", *where),
                foreseen=foreseen if shapes else (),
            )


@each_family
def test_names_that_published_files_have_are_none_too_many(
    case: Case, policy: PipelinePolicy, copy: Path
) -> None:
    """Tied weights once or twice, heads that no encoder uses, and what older libraries wrote."""
    expected = policy.encode(PROMPT)

    def as_before(component: str, made: Callable[[Tensors], Tensors]) -> None:
        file = file_of(copy / component)
        before = change(file, made)
        config = case.config(path=str(copy))
        assert not check_files(config).unclear
        found = load_policy(config, text_encoders=True, vae=False).encode(PROMPT)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        file.write_bytes(before)

    tied, old = "encoder.embed_tokens.weight", {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    head = {"lm_head.weight": torch.zeros(4, 16)}
    for name, kind in policy.parts.encoders.items():
        if kind == "T5EncoderModel":
            as_before(name, lambda all_: {**all_, tied: all_["shared.weight"].clone()})
            as_before(name, lambda all_: {tied if k == "shared.weight" else k: t for k, t in all_.items()})
        elif kind == "CLIPTextModel":
            as_before(name, lambda all_: {f"text_model.{k}": t for k, t in all_.items()} | old)
        elif kind == "Gemma2Model":
            as_before(name, lambda all_: {f"model.{k}": t for k, t in all_.items()} | head)


def test_weights_that_are_no_numbers_are_named(sd3: Case, sd3_copy: Path) -> None:
    for name, wrong in (("transformer", "nan"), ("vae", "-inf"), ("text_encoder_3", "inf")):
        file = file_of(sd3_copy / name)
        weights = load_file(file)
        weight = some_weight(weights)
        weights[weight].view(-1)[1] = float(wrong)
        before = change(file, lambda _, weights=weights: weights)
        told = f"the {name} has weights that are not finite (NaN or infinite): 1 weight: {weight}"
        refuses(sd3, sd3_copy, told, unseen=True)
        file.write_bytes(before)


@each_family
def test_empty_configurations_are_named(case: Case, policy: PipelinePolicy, copy: Path) -> None:
    for name in (policy.parts.denoiser, "vae"):
        config = copy / name / "config.json"
        before = config.read_text()
        config.write_text("{}")
        refuses(case, copy, f"{copy}: {name}/config.json has no '", "that the weights were saved with")
        config.write_text(before)
    name = next(iter(policy.parts.encoders))
    (copy / name / "config.json").write_text("{}")
    refuses(
        case, copy, f"the {name} cannot be loaded: {copy / name / 'config.json'} does not say", "model_type"
    )


@each_family
def test_vocabularies_that_are_empty_or_none_are_named(case: Case, copy: Path) -> None:
    vocabulary = copy / "tokenizer" / "tokenizer.json"
    whole = json.loads(vocabulary.read_text())
    # Of what was said by a library: not a key alone.
    vocabulary.write_text(json.dumps({"model": whole["model"]}))
    told = f"the tokenizer cannot be loaded: {vocabulary.parent}: KeyError('added_tokens')"
    refuses(case, copy, told, unseen=True)
    special = [token for token in whole["added_tokens"] if token["special"]]
    for kind in (dict, list):
        empty = whole | {"model": whole["model"] | {"vocab": kind()}, "added_tokens": special}
        for text in ("", "{}", "[]", '{"model": ', json.dumps(empty)):
            vocabulary.write_text(text)
            told = (
                f"the tokenizer has no vocabulary: no word is in {vocabulary} ({len(text)} bytes); download"
            )
            refuses(case, copy, told)
    vocabulary.unlink()
    refuses(
        case, copy, f"the tokenizer has no vocabulary: {vocabulary.parent} holds none of tokenizer.json, "
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("transformer", SD3Transformer2DModel), ("text_encoder", CLIPTextModelWithProjection)],
)
def test_shards_that_are_not_whole_are_named(sd3: Case, sd3_copy: Path, name: str, kind: Any) -> None:
    component = sd3_copy / name
    model = kind.from_pretrained(component)
    file_of(component).unlink()
    model.save_pretrained(component, max_shard_size="8KB")
    first, second, *_ = sorted(component.glob("*.safetensors"))
    load_policy(sd3.config(path=str(sd3_copy)), text_encoders=True, vae=False)
    whole = second.read_bytes()
    second.write_bytes(first.read_bytes())
    refuses(sd3, sd3_copy, f"the {name} is not whole: {second} lacks ", "copy of another shard")
    second.unlink()
    refuses(sd3, sd3_copy, f"the {name} is not whole: {second} is missing")
    size = len(whole) // 2
    second.write_bytes(whole[:size])
    refuses(
        sd3, sd3_copy, f"the {name} cannot be loaded: {second} is no whole safetensors file ({size} bytes)"
    )
    second.write_bytes(whole)
    (index,) = component.glob("*.index.json")
    index.write_text("[]")
    refuses(sd3, sd3_copy, f"the {name} cannot be loaded: {index} is no index of shards")
    index.write_text('{"metadata": {}, "weight_map": {}}')
    refuses(sd3, sd3_copy, f"the {name} is not whole: the weight_map of {index} names no weight")


def test_an_encoder_of_other_shapes_is_named(sd3: Case, sd3_copy: Path) -> None:
    file = file_of(sd3_copy / "text_encoder")
    wrong = [key for key in load_file(file) if key.endswith("v_proj.weight")][-1]
    change(file, lambda all_: all_ | {wrong: all_[wrong][:3].clone()})
    refuses(sd3, sd3_copy, f"in {file} {wrong} is (3, 16), expected (16, 16); config.json must be the one")
