"""What the model card of an export tells of the run behind it: updates, images, rewards, scores, recipe.

Promises
- Scores are those of the exported weights, or there are none and the card says how to get them.
- No address, token or path of a server or a queue is told, and of whole paths of files and folders here only
  the last name.

The card itself, with base model and call: policy/model_card.py.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import yaml

from policy.model_card import Training, published
from services.config import Config, RewardConfig
from services.config_file import ConfigError
from services.formatting import estimate
from services.metrics import EvalRow
from services.prompts import prompt_source
from services.run_directory import RunDirectory
from services.telemetry import read_metrics

if TYPE_CHECKING:
    from learner.checkpoint import Checkpoint

WEIGHTS: Final = {"ema": "EMA of the policy (`ema`)", "policy": "the policy's own (`policy`)"}
"""What may be exported of a checkpoint -> how the card has it."""
RECIPE: Final[dict[str, tuple[str, ...]]] = {
    "run": ("seed",),
    "model": (
        *("path", "revision", "train", "lora", "dtype", "embedded_guidance"),
        *("max_sequence_length", "height", "width"),
    ),
    "rollout": (
        *("group_size", "solver", "order", "noise_level", "steps", "shift", "sigmas", "terminal", "guidance"),
    ),
    "advantage": ("std", "epsilon", "combine", "weights", "clip"),
    "learner": (
        *("groups_per_step", "optimizer_steps", "max_steps", "optimizer", "learning_rate", "warmup_steps"),
        *("final_learning_rate", "betas", "weight_decay", "max_grad_norm", "ema_decay", "ema_every"),
    ),
    "queue": ("max_staleness",),
    "eval": ("seed", "solver"),
}
"""Settings that the weights, or their scores, follow from; of prompts and objective all are told."""


def training_of(run: RunDirectory, config: Config, checkpoint: Checkpoint, weights: str) -> Training:
    """What a card tells of the weights of a checkpoint.

    Args:
        weights: `ema` or `policy`.
    """
    metrics = read_metrics(run.root)
    facts: dict[str, object] = {
        "run": f"{run.name}, seed {config.run.seed}",
        "updates": f"{checkpoint.step} of {config.learner.max_steps}",
    }
    for row in metrics.updates:
        if row.step == checkpoint.step:
            facts["images"] = f"{row.images:,} in {row.groups:,} groups of {config.rollout.group_size}"
    facts["weights"] = WEIGHTS[weights]
    # Evaluations inside a run are of the EMA, each of one step.
    at = [row for row in metrics.evals if row.step == checkpoint.step] if weights == "ema" else []
    scores = _Scores(before=metrics.evaluation("before"), now=at[-1] if at else None)
    return Training(
        objective=type(config.objective),
        name=run.name,
        prompt=_example(config) or Training.prompt,
        facts=facts,
        sections=f"{_rewards(config, scores, checkpoint.step, weights)}\n{_recipe(config)}",
    )


class _Scores:
    """Evaluations of the untrained model, and of what is exported."""

    def __init__(self, before: EvalRow | None, now: EvalRow | None) -> None:
        comparable = before is not None and now is not None and before.prompts == now.prompts
        self.before = before if comparable and before is not now else None
        self.now = now

    def cell(self, row: EvalRow, reward: str) -> str:
        if reward not in row.rewards:
            return "-"
        score = row.rewards[reward]
        told = estimate(score.mean, score.se)
        if (exact := row.exact.get(reward)) is not None:
            told += f", exact {estimate(exact.mean, exact.se)}"
        return told


def _rewards(config: Config, scores: _Scores, step: int, weights: str) -> str:
    rows = [("before training", scores.before), (f"after {step} updates", scores.now)]
    told = [(heading, row) for heading, row in rows if row is not None]
    heads = ["reward", "scorer", "weight", *(heading for heading, _ in told)]
    lines = [heads, ["---"] * len(heads)]
    for reward in config.rewards:
        cells = [scores.cell(row, reward.name) for _, row in told]
        lines.append([reward.name, _scorer(reward), _weight(reward), *cells])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"## Rewards\n\n{table}\n{_how_scored(config, scores, step, weights)}\n"


def _how_scored(config: Config, scores: _Scores, step: int, weights: str) -> str:
    if scores.now is None:
        why = (
            "evaluations inside a run are of its EMA weights"
            if weights != "ema"
            else f"the run was not evaluated at update {step}"
        )
        return f"No scores: {why}; `dgpo eval RUN_DIR --weights {weights}` gives them."
    rollout = config.evaluation_rollout
    guidance = f"guidance {rollout.guidance:g}" if rollout.guidance > 1 else "no guidance"
    return (
        f"Scores are means over {scores.now.prompts} held-out prompts with standard errors; "
        f"one image a prompt, {rollout.steps} steps of {rollout.solver}, {guidance}."
    )


def _scorer(reward: RewardConfig) -> str:
    # The address of a server says nothing to a reader, and may be nobody's business.
    if reward.app is None:
        return "a reward server of that name"
    args = {name: value for name, value in reward.args.items() if "://" not in str(value)}
    return f"`{reward.app}`" + (f" `{json.dumps(published(args))}`" if args else "")


def _weight(reward: RewardConfig) -> str:
    if reward.heldout:
        return "held out, never trained on"
    scale = "" if reward.range is None else f", {reward.range[0]:g} to {reward.range[1]:g} as 0 to 1"
    return f"{reward.weight:g}{scale}"


def _recipe(config: Config) -> str:
    whole = config.model_dump(mode="json")
    told = {
        name: {key: whole[name][key] for key in keys if whole[name][key] is not None}
        for name, keys in RECIPE.items()
    }
    if config.model.train == "full":
        del told["model"]["lora"]
    # Here a null means something: it switches a part off.
    told["objective"] = whole["objective"]
    told["prompts"] = {"source": config.prompts.source} | config.prompts.model_dump(
        mode="json", exclude_defaults=True
    )
    order = [name for name in whole if name in told]
    text = yaml.safe_dump(
        published({name: told[name] for name in order}), sort_keys=False, allow_unicode=True
    )
    return (
        "## Recipe\n\nWhat the weights follow from, beside the rewards; other settings are how the run was "
        f"carried out.\n\n```yaml\n{text}```\n"
    )


def _example(config: Config) -> str | None:
    """A held-out prompt of the run, if it has any that can still be read."""
    try:
        found = prompt_source(config).heldout(config.run.seed, 1)
    except ConfigError:
        return None
    return found[0].text if found else None
