"""A base is known by its weights: however they lie in files and memory, and not if they are others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from family_case import Case
from safetensors.torch import load_file, save_file

from policy import PolicyError
from policy.base_digest import base_digest, base_digest_of_files


def test_the_same_base_has_one_digest_in_files_shards_dtypes_and_under_adapters(
    case: Case, tmp_path: Path
) -> None:
    digest = base_digest_of_files(case.config())
    assert digest is not None
    for dtype in ("float32", "bfloat16"):
        policy = case.load(train="lora", dtype=dtype)
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.add_(1)
        assert base_digest(policy.transformer.state_dict()) == digest
    again, name = tmp_path / "again", policy.parts.denoiser
    shutil.copytree(case.directory, again, ignore=shutil.ignore_patterns("*.safetensors"))
    kind = getattr(diffusers, policy.parts.denoiser_class)
    denoiser = kind.from_pretrained(case.directory / name, torch_dtype=torch.bfloat16)
    denoiser.save_pretrained(again / name, max_shard_size="20KB")
    (shard, *more) = sorted((again / name).glob("*.safetensors"))
    assert more
    # What the index does not name is not loaded.
    save_file(load_file(shard) | {"left.behind": torch.ones(3)}, shard)
    assert base_digest_of_files(case.config(path=str(again))) == digest
    assert base_digest_of_files(case.config(path="acme/tiny")) is None


def test_another_base_has_another_digest(case: Case, tmp_path: Path) -> None:
    digest = base_digest_of_files(case.config())
    other = tmp_path / "other"
    shutil.copytree(case.directory, other)
    (file,) = (other / case.load().parts.denoiser).glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[len(weights) // 2]
    changes = {
        "trained": {name: weights[name] * 1.1},
        "reshaped": {name: weights[name][None]},
        "renamed": {f"{name}.more": weights[name].clone()},
    }
    found = {digest}
    for change in changes.values():
        save_file(weights | change, file)
        found.add(base_digest_of_files(case.config(path=str(other))))
    assert len(found) == 1 + len(changes)


def test_a_file_that_is_no_layout_is_named(case: Case, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(case.directory, other)
    (file,) = (other / case.load().parts.denoiser).glob("*.safetensors")
    head = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + b"0")
    with pytest.raises(PolicyError, match=f"{file}"):
        base_digest_of_files(case.config(path=str(other)))
