"""`dgpo eval`: score a model on held-out prompts, outside of a run.

Promises
- The same prompts, seeds, solver and rewards as the evaluations inside a run of the same recipe, so that the
  scores are paired with those.
- Starts only the reward servers that the recipe names by app; the model runs in this process.

Evaluations on a suite of prompts, over several workers: services/suites/.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from services.conditions import condition_cache
from services.config import Config
from services.config_file import ConfigError, find, load_config
from services.run_directory import RunDirectory
from services.suites.settings import with_rewards


def evaluate_model(
    model: Path,
    recipe: str | None,
    weights: str,
    overrides: tuple[str, ...],
    screen: Console,
    rewards: list[str] | None = None,
) -> dict[str, Any]:
    """Evaluate a run directory's newest checkpoint, one checkpoint directory, or a pipeline directory.

    Args:
        model: one of those three.
        recipe: needed for a pipeline directory; a run brings its own.
        weights: `ema` or `policy`, of a checkpoint.
        rewards: instead of those of the recipe (services/suites/settings.py `with_rewards`).

    Returns:
        Means and standard errors by reward, exact rates, diversity (null unless prompts are words) and what
        was evaluated.

    Raises:
        ConfigError: it is none of the three, or there is nothing to evaluate on.
    """
    import torch

    from policy import load_policy
    from rollout_workers.evaluation import evaluate
    from rollout_workers.scoring import RewardServers
    from services.cluster_room import require_room
    from services.demands import reward_demands
    from services.driver import reward_places
    from services.prompts import prompt_source
    from services.ray_runtime import ray_cluster

    config, checkpoint = to_evaluate(model, recipe, overrides)
    if rewards:
        config = with_rewards(config, rewards)
    prompts = prompt_source(config).heldout(config.eval.seed, config.eval.final_prompts)
    if not prompts:
        raise ConfigError("eval.path: no held-out prompts; give a file of them (--set eval.path=FILE)")
    torch.set_num_threads(config.rollout.threads)
    run = checkpoint.parent.parent if checkpoint is not None else None
    policy = load_policy(
        config.model,
        text_encoders=True,
        vae=True,
        base=False,
        seed=config.run.seed,
        condition_cache=condition_cache(config, run),
    )
    if checkpoint is not None:
        policy.install(_weights(checkpoint, weights))
    with tempfile.TemporaryDirectory() as folder, screen.status("starting the reward servers") as status:
        private = RunDirectory(Path(folder))
        with ray_cluster(config) as own_ray, ExitStack() as serving:
            require_room(config, reward_demands(config), own_ray=own_ray, tell=status.update)
            places = serving.enter_context(reward_places(config, private, own_ray))
            scorer = RewardServers(config.rewards, places)
            status.update(f"sampling and scoring {len(prompts)} prompts")
            found = evaluate(policy, scorer, config, prompts, with_diversity=True)
            scorer.close()
    result = {
        "model": str(checkpoint or find(config.model.path)),
        "weights": weights if checkpoint is not None else None,
        "prompts": len(prompts),
        "rewards": {name: estimate.model_dump() for name, estimate in found.rewards.items()},
        "exact": {name: estimate.model_dump() for name, estimate in found.exact.items()},
        "diversity": found.diversity or None,
        "seconds": round(found.seconds, 1),
    }
    screen.print(_table(result))
    return result


def to_evaluate(model: Path, recipe: str | None, overrides: tuple[str, ...]) -> tuple[Config, Path | None]:
    """The configuration to evaluate with, and the checkpoint, if it is not a pipeline.

    Raises:
        ConfigError: it is neither a run directory, a checkpoint nor a pipeline.
    """
    from learner.checkpoint import newest_checkpoint

    if (model / "model_index.json").is_file():
        if recipe is None:
            raise ConfigError(
                f"{model} is a pipeline: say --recipe, which names prompts, rewards and sampling"
            )
        config = load_config(recipe, overrides)
        return _with_model(config, model), None
    if (model / "manifest.json").is_file():
        checkpoint, run = model, RunDirectory.open(model.parent.parent)
    elif (model / "config.yaml").is_file():
        run = RunDirectory.open(model)
        newest = newest_checkpoint(run.root)
        if newest is None:
            raise ConfigError(f"{model}: the run has no complete checkpoint yet")
        checkpoint = newest.path
    else:
        raise ConfigError(f"{model}: neither a run directory, a checkpoint nor a pipeline directory")
    config = load_config(recipe, overrides) if recipe is not None else run.config(overrides)
    return config, checkpoint


def _with_model(config: Config, model: Path) -> Config:
    raw = config.model_dump(mode="json")
    raw["model"]["path"] = str(model)
    return Config.model_validate(raw)


def _weights(checkpoint: Path, weights: str) -> dict[str, Any]:
    from learner.checkpoint import read_checkpoint

    state = read_checkpoint(checkpoint).state
    if weights not in ("ema", "policy"):
        raise ConfigError(f"--weights {weights!r}: ema or policy")
    return state[weights]


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
