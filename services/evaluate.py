"""`dgpo eval`: score a model on held-out prompts, outside of a run.

Promises
- The same prompts, seeds, solver and rewards as the evaluations inside a run of the same recipe, so that the
  scores are paired with those.
- Starts only the reward servers that the recipe names by app; the model runs in this process.

Evaluations on a suite of prompts, over several workers: services/suites/.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from services.conditions import condition_cache
from services.config import Config
from services.config_file import ConfigError, find, load_for_evaluation, parse_config
from services.exported_lora import LORA, base_of, check_base, is_exported_lora, read_lora
from services.messages import Prompt
from services.run_directory import RunDirectory
from services.suites.settings import with_rewards, without_prompts


def evaluate_model(
    model: Path,
    recipe: str | None,
    weights: str,
    overrides: tuple[str, ...],
    screen: Console,
    rewards: list[str] | None = None,
    revision: str | None = None,
    other_base: bool = False,
) -> dict[str, Any]:
    """Evaluate what `to_evaluate` finds.

    Args:
        model, recipe, weights, overrides, revision, other_base: see there.
        rewards: instead of those of the recipe (services/suites/settings.py `with_rewards`).

    Returns:
        Means and standard errors by reward, exact rates, diversity (null unless prompts are words) and what
        was evaluated.

    Raises:
        ConfigError: it is none of those, or there is nothing to evaluate on.
    """
    import torch

    from policy import load_policy
    from policy.base_digest import base_digest
    from rollout_workers.evaluation import evaluate
    from rollout_workers.scoring import RewardServers
    from services.cluster_room import require_room
    from services.demands import reward_demands
    from services.driver import reward_places
    from services.ray_runtime import ray_cluster

    found_model = to_evaluate(
        model, recipe, overrides, weights=weights, revision=revision, other_base=other_base
    )
    place, kind = found_model.weights, found_model.kind
    with_diversity = found_model.config.prompts.source == "words"
    config, prompts = asked(found_model.config, rewards or [])
    torch.set_num_threads(config.rollout.threads)
    run = place.parent.parent if place is not None and kind != LORA else None
    policy = load_policy(
        config.model,
        text_encoders=True,
        vae=True,
        base=False,
        seed=config.run.seed,
        condition_cache=condition_cache(config, run),
    )
    if place is not None:
        if found_model.base_digest is not None:
            found_digest = base_digest(policy.transformer.state_dict())
            check_base(place, found_model.base_digest, found_digest, config.model.path)
        policy.install(read_lora(place) if kind == LORA else _weights(place, kind))
    with tempfile.TemporaryDirectory() as folder, screen.status("starting the reward servers") as status:
        private = RunDirectory(Path(folder))
        with ray_cluster(config, queue=False) as own_ray, ExitStack() as serving:
            require_room(config, reward_demands(config), own_ray=own_ray, tell=status.update)
            places = serving.enter_context(reward_places(config, private, own_ray))
            scorer = RewardServers(config.rewards, places)
            status.update(f"sampling and scoring {len(prompts)} prompts")
            found = evaluate(policy, scorer, config, prompts, with_diversity=with_diversity)
            scorer.close()
    result = {
        "model": str(place or find(config.model.path)),
        "revision": config.model.revision if place is None else None,
        "weights": kind,
        "prompts": len(prompts),
        "rewards": {name: estimate.model_dump() for name, estimate in found.rewards.items()},
        "exact": {name: estimate.model_dump() for name, estimate in found.exact.items()},
        "diversity": found.diversity or None,
        "seconds": round(found.seconds, 1),
    }
    screen.print(_table(result))
    return result


def asked(config: Config, rewards: list[str]) -> tuple[Config, list[Prompt]]:
    """What a model is asked for, and a configuration with the rewards that score it (`with_rewards`).

    Raises:
        ConfigError: there is nothing to evaluate on, or no such reward.
    """
    from services.prompts import prompt_source

    # Before the rewards are replaced: those of a recording are its own.
    prompts = prompt_source(config).heldout(config.eval.seed, config.eval.final_prompts)
    if not prompts:
        raise ConfigError("eval.path: no held-out prompts; give a file of them (--set eval.path=FILE)")
    return without_prompts(with_rewards(config, rewards) if rewards else config), prompts


@dataclass(frozen=True)
class Evaluated:
    """What is evaluated."""

    config: Config
    weights: Path | None
    """A checkpoint's directory, or an exported LoRA's; None: the weights of the pipeline itself."""
    kind: str | None
    """`ema` or `policy`, of a checkpoint; `lora`; None, of a pipeline."""
    base_digest: str | None = None
    """Of the base that a LoRA needs; None: any will do."""


def to_evaluate(
    model: Path,
    recipe: str | None,
    overrides: tuple[str, ...],
    *,
    weights: str = "ema",
    revision: str | None = None,
    other_base: bool = False,
) -> Evaluated:
    """Find out what is to be evaluated, and with which configuration.

    Args:
        model: a run directory (its newest checkpoint), one of its checkpoints, a pipeline directory, an
            exported LoRA, or a hub id.
        recipe: needed for the last three; a run brings its own.
        weights: `ema` or `policy`, of a checkpoint.
        revision: of a hub id.
        other_base: a LoRA may be on another base than it was trained on.

    Raises:
        ConfigError: it is none of those, or its model cannot be loaded, or is not the one that it needs.
    """
    if weights not in ("ema", "policy"):
        raise ConfigError(f"--weights {weights!r}: ema or policy")
    hub = _may_be_hub_id(model)
    if revision is not None and not hub:
        raise ConfigError(f"--revision {revision}: for a model of the hub, and {model} is none")
    if other_base and not is_exported_lora(model):
        raise ConfigError(f"--other-base: for an exported LoRA, and {model} is none")
    if (model / "manifest.json").is_file() or (model / "config.yaml").is_file():
        return _of_run(model, recipe, overrides, weights)
    lora = is_exported_lora(model)
    if not (hub or lora or (model / "model_index.json").is_file()):
        parts = [name for name in ("pipeline", LORA) if (model / name).is_dir()]
        hint = f"; it has {' and '.join(parts)} in it: give one of them" if parts else ""
        raise ConfigError(
            f"{model}: neither a run directory, a checkpoint, a pipeline directory, an exported LoRA nor a "
            f"hub id (ORGANISATION/NAME){hint}"
        )
    if recipe is None:
        what = "a LoRA" if lora else "a model of the hub" if hub else "a pipeline"
        raise ConfigError(f"{model} is {what}: say --recipe, which names prompts, rewards and sampling")
    config = load_for_evaluation(recipe, overrides)
    if not lora:
        return _loadable(
            Evaluated(_with_model(config, {"path": str(model), "revision": revision}), None, None)
        )
    base = base_of(model)
    settings = {"path": base.path, "revision": base.revision, "train": "lora", "lora": base.settings}
    hint = f"; {model} names it as its base: say where that is with --set model.path=DIR"
    if any(override.startswith("model.path=") for override in overrides):
        settings |= {"path": config.model.path, "revision": config.model.revision}
        hint = ""
    needed = None if other_base else base.digest
    return _loadable(Evaluated(_with_model(config, settings), model, LORA, needed), hint)


def _of_run(model: Path, recipe: str | None, overrides: tuple[str, ...], weights: str) -> Evaluated:
    from learner.checkpoint import newest_checkpoint

    if (model / "manifest.json").is_file():
        # Not resolved: a folder of checkpoints may be a link to another disk.
        checkpoint = Path(os.path.abspath(model))  # noqa: PTH100
        run = RunDirectory.open(checkpoint.parent.parent)
    else:
        run = RunDirectory.open(model)
        newest = newest_checkpoint(run.root)
        if newest is None:
            raise ConfigError(f"{model}: the run has no complete checkpoint yet")
        checkpoint = newest.path
    config = load_for_evaluation(run.config_file if recipe is None else recipe, overrides)
    return Evaluated(config, checkpoint, weights)


def _may_be_hub_id(model: Path) -> bool:
    # A folder that exists here makes it a mistyped path: say so at once instead of asking the hub.
    parts = str(model).split("/")
    return len(parts) == 2 and not str(model).startswith((".", "~")) and not find(parts[0]).exists()


def _with_model(config: Config, settings: dict[str, Any]) -> Config:
    raw = config.model_dump(mode="json")
    raw["model"] |= settings
    return parse_config(raw, source=f"the recipe with model.path {settings['path']}")


def _loadable(found: Evaluated, hint: str = "") -> Evaluated:
    """Told before anything is started, with a hint behind it; of weights next to nothing is read.

    Whether a base that is not in a directory here is the one of a LoRA is seen when it is loaded.
    """
    from policy.base_digest import base_digest_of_files
    from policy.errors import PolicyError
    from policy.registry import read_family

    try:
        read_family(found.config.model)
        here = base_digest_of_files(found.config.model) if found.base_digest is not None else None
    except PolicyError as error:
        raise ConfigError(f"{error}{hint}") from error
    if found.weights is not None:
        check_base(found.weights, found.base_digest, here, found.config.model.path)
    return found


def _weights(checkpoint: Path, kind: str | None) -> dict[str, Any]:
    from learner.checkpoint import read_checkpoint

    assert kind is not None
    return read_checkpoint(checkpoint).state[kind]


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['model']}: {result['prompts']} held-out prompts", title_justify="left")
    for heading in ("reward", "score", "exact"):
        table.add_column(heading, justify="left" if heading == "reward" else "right")
    for name, score in result["rewards"].items():
        table.add_row(name, _cell(score), _cell(result["exact"].get(name)))
    return table


def _cell(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return "-"
    error = estimate["se"]
    return f"{estimate['mean']:.3f}" + (f" ± {error:.3f}" if error is not None else "")
