"""What an evaluation's scores depend on: recorded in its folder, and the same when it goes on.

Promises
- Weights, prompts and rewards are told by what they are, not by where they lie: a digest of the weights, of
  the base model and of the prompts. A run directory that has moved is still the same.
- Nothing secret is in here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import xxhash

from services.checkpoint_parts import sha256_of
from services.config import Config, RewardConfig
from services.config_file import ConfigError, find
from services.exported_lora import LORA, lora_file
from services.messages import Message
from services.suites.prompts import Suite

SHARD_PROMPTS = 16
OF_ROLLOUT: Final = {"solver", "order", "noise_level", "steps", "shift", "sigmas", "terminal", "guidance"}
OF_MODEL: Final = {"height", "width", "max_sequence_length", "dtype", "embedded_guidance"}
"""What images follow from, beside weights, prompts and seeds."""


class EvaluationSettings(Message):
    """One evaluation of a suite."""

    format: Literal[1] = 1
    model: str
    """Where the weights were found; another place may hold the same ones."""
    base: str
    """The pipeline: digest of a directory, or id and revision of one on the hub."""
    weights: str | None
    """Digest of a checkpoint's or a LoRA's weights; null: those of the pipeline."""
    kind: str | None
    """`ema` or `policy`, of a checkpoint; `lora`; null, of a pipeline."""
    suite: str
    prompts: int
    prompts_digest: str
    samples: int
    """Images a prompt."""
    seed: int
    """The seeds of every image follow from it, the prompt's place and the sample's number."""
    shard_prompts: int = SHARD_PROMPTS
    """Prompts that are sampled together, in batches of `batch` images."""
    sampling: dict[str, Any]
    rewards: dict[str, dict[str, Any]]

    def differences(self, other: EvaluationSettings) -> Iterator[str]:
        """A line for each thing that another evaluation has otherwise."""
        own, others = _leaves(self.model_dump(mode="json")), _leaves(other.model_dump(mode="json"))
        for path in sorted(own.keys() | others.keys()):
            if path != "model" and own.get(path) != others.get(path):
                yield f"{path}: {own.get(path)!r}; there {others.get(path)!r}"


def settings_of(
    config: Config, weights: Path | None, kind: str | None, suite: Suite, samples: int
) -> EvaluationSettings:
    """The settings of an evaluation.

    Args:
        config: with the rewards to ask for.
        weights: their directory; None evaluates the pipeline as it is.
        kind: which of them (services/evaluate.py).
    """
    rollout, model = config.evaluation_rollout, config.model
    adapters = weights is not None and model.train == "lora"
    return EvaluationSettings(
        model=str(weights or find(model.path)),
        base=base_digest(config),
        weights=None if weights is None or kind is None else _weights_digest(weights, kind),
        kind=None if weights is None else kind,
        suite=suite.name,
        prompts=len(suite.prompts),
        prompts_digest=suite.digest,
        samples=samples,
        seed=config.eval.seed,
        sampling={
            **rollout.model_dump(include=OF_ROLLOUT),
            **model.model_dump(include=OF_MODEL),
            # Their alpha scales them, and is not among the weights of a checkpoint.
            "lora": model.lora.model_dump(mode="json") if adapters else None,
            "batch": config.eval.batch,
            "score_batch": config.rollout.group_size,
        },
        rewards={
            reward.name: reward.model_dump(mode="json", include={"app", "args", "url"})
            for reward in config.rewards
        },
    )


def base_digest(config: Config) -> str:
    """Of the pipeline's files, or its id and revision on the hub."""
    place = find(config.model.path)
    if not place.is_dir():
        return f"{config.model.path}@{config.model.revision}"
    digest = xxhash.xxh3_128()
    for file in sorted(place.rglob("*")):
        if file.suffix in (".json", ".safetensors", ".txt", ".model"):
            digest.update(f"{file.relative_to(place)}\0".encode())
            with file.open("rb") as stream:
                while piece := stream.read(1 << 22):
                    digest.update(piece)
    return digest.hexdigest()


def with_rewards(config: Config, chosen: list[str]) -> Config:
    """The configuration with these rewards alone, each asked for as an evaluation does: always.

    Args:
        chosen: names of rewards of the recipe, or of scorers; a scorer may have arguments, `NAME={JSON}`.
            Empty: those of the recipe.

    Raises:
        ConfigError: there is neither such a reward nor such a scorer, or its arguments are no JSON object.
    """
    rewards = [_reward(config, name, args) for name, args in map(_split, _listed(chosen))] or list(
        config.rewards
    )
    raw = config.model_dump(mode="json")
    plain = {"weight": 1.0, "range": None, "required": True, "heldout": False, "every": 1}
    raw["rewards"] = [reward.model_dump(mode="json") | plain for reward in rewards]
    raw["guard"] = {}
    names = [reward.name for reward in rewards]
    if len(set(names)) != len(names):
        raise ConfigError(f"--rewards names one twice: {', '.join(names)}")
    return Config.model_validate(raw)


def without_prompts(config: Config) -> Config:
    """The configuration of an evaluation whose prompts are known: of a recording, no reward but its own could
    be asked, and no worker would be started."""
    raw = config.model_dump(mode="json")
    raw["eval"]["path"] = None
    raw["prompts"] = {"source": "words"}
    return Config.model_validate(raw)


def _listed(chosen: list[str]) -> Iterator[str]:
    for text in chosen:
        yield from [text] if "=" in text else [part.strip() for part in text.split(",") if part.strip()]


def _split(text: str) -> tuple[str, dict[str, Any] | None]:
    import json

    name, separator, told = text.partition("=")
    if not separator:
        return text, None
    try:
        args = json.loads(told)
    except ValueError as error:
        raise ConfigError(f"--rewards {text!r}: the arguments are no JSON: {error}") from error
    if not isinstance(args, dict):
        raise ConfigError(f"--rewards {text!r}: expected NAME={{...}}, a JSON object of arguments")
    return name.strip(), args


def _reward(config: Config, name: str, args: dict[str, Any] | None) -> RewardConfig:
    from reward_servers.scorers import is_scorer, scorer_names

    known = {reward.name: reward for reward in config.rewards}
    if name in known:
        if args is not None and known[name].app is None:
            raise ConfigError(f"--rewards {name}: the recipe has it at a url, which takes no arguments")
        return known[name] if args is None else known[name].model_copy(update={"args": args})
    if not is_scorer(name):
        raise ConfigError(
            f"--rewards {name}: the recipe has no reward of that name ({', '.join(known)}), and there is no "
            f"such scorer: {', '.join(scorer_names())}, or package.module:create"
        )
    # A scorer of another package is named by where it is, and its reward after the module.
    return RewardConfig(name=name.partition(":")[0].rpartition(".")[2], app=name, args=args or {})


def _weights_digest(checkpoint: Path, kind: str) -> str:
    from learner.checkpoint import read_checkpoint

    if kind == LORA:
        return sha256_of(lora_file(checkpoint))
    digest = read_checkpoint(checkpoint).digest(kind)
    if digest is None:
        raise ConfigError(f"{checkpoint}: has no weights {kind!r}: ema or policy")
    return digest


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {
        name: leaf
        for key, part in value.items()
        for name, leaf in _leaves(part, f"{path}.{key}" if path else key).items()
    }
