"""Encoded prompts on disk (`model.text_encoders: cached`): each is encoded once, for all who share them.

    DIRECTORY/MODEL/ab/abcd....safetensors     one a prompt, named by the sha256 of its text
              MODEL/model.json                 what MODEL is the digest of

Promises
- What is read is what was written, bit for bit: a file holds its prompt and the sha256 of its tensors, and
  one that is cut short, changed or of another prompt is told in the log and taken for absent.
- MODEL follows from all that a condition depends on: the text encoders and tokenizers (their files, or hub id
  and commit), dtype, number of tokens, and the versions of diffusers and transformers.
- Any number of processes and nodes may share a directory: a file appears whole, by one rename.
- Nothing is ever deleted; a directory may be, at any time, at the price of encoding again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load, save

from policy.base import Condition
from policy.errors import PolicyError
from policy.loading import Parts
from services.config import ModelConfig
from services.full_disk import naming

logger = logging.getLogger(__name__)

FORMAT: Final = 1


class ConditionCache:
    """The conditions of one model.

    Args:
        directory: of all models.
        model: what a condition depends on, JSON values.
    """

    def __init__(self, directory: Path, model: Mapping[str, Any]) -> None:
        self._model = json.dumps(model, sort_keys=True, indent=2)
        self.directory = directory / hashlib.sha256(self._model.encode()).hexdigest()[:16]

    def has(self, prompt: str | None) -> bool:
        """Whether there is a file of it; only `read` says whether it is whole."""
        return self._path(prompt).is_file()

    def read(self, prompt: str | None) -> Condition | None:
        """The condition of a prompt on the CPU; None: there is none. The prompt None is the negative one."""
        path = self._path(prompt)
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return _checked(raw, prompt)
        # Whatever a damaged file makes of its reader: it is not trusted.
        except Exception as error:
            logger.warning("condition cache: %s is damaged and will be made again: %s", path, error)
            return None

    def write(self, prompt: str | None, condition: Condition) -> None:
        """Keep a condition.

        Raises:
            OSError: it cannot be written; the file is named.
        """
        path = self._path(prompt)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in condition.items()}
        told = {"prompt": json.dumps(prompt), "sha256": _digest(tensors)}
        description = self.directory / "model.json"
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not description.exists():
                _put(description, self._model.encode())
            _put(path, save(tensors, metadata=told))

    def _path(self, prompt: str | None) -> Path:
        name = hashlib.sha256(json.dumps(prompt).encode()).hexdigest()
        return self.directory / name[:2] / f"{name}.safetensors"


def model_of(parts: Parts, config: ModelConfig, location: str, index: Mapping[str, Any]) -> dict[str, Any]:
    """What the conditions of a model depend on. Reads all of its text encoders, once a process.

    Raises:
        PolicyError: it is of a hub, and its commit is not known.
    """
    return {
        "format": FORMAT,
        "pipeline": parts.pipeline,
        "components": {name: index.get(name) for name in parts.text},
        "weights": _weights(parts, config, location),
        "dtype": config.dtype,
        "max_sequence_length": config.max_sequence_length,
        "versions": {name: metadata.version(name) for name in ("diffusers", "transformers")},
    }


def _weights(parts: Parts, config: ModelConfig, location: str) -> Any:
    if not Path(location).is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(location, "model_index.json", revision=config.revision)
        if not isinstance(found, str):
            raise PolicyError(
                f"model.path {location}: the hub's own cache does not say which commit it is of, so encoded "
                "prompts could be another's; set model.text_encoders to offload, or model.path to a directory"
            )
        return {"hub": location, "commit": Path(found).parent.name}
    files = sorted(
        path for name in parts.text for path in (Path(location) / name).rglob("*") if path.is_file()
    )
    return {str(path.relative_to(location)): _file_digest(path, path.stat().st_mtime_ns) for path in files}


@cache
def _file_digest(path: Path, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(raw: bytes, prompt: str | None) -> Condition:
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    told = header["__metadata__"]
    # Copies: memory of their own, aligned as torch has it.
    tensors = {name: tensor.clone() for name, tensor in load(raw).items()}
    if json.loads(told["prompt"]) != prompt:
        raise ValueError(f"it is of the prompt {told['prompt']}")
    if _digest(tensors) != told["sha256"]:
        raise ValueError("its sha256 is not the one that was written")
    return tensors


def _digest(tensors: Condition) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _put(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
