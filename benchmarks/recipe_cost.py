"""What an update of a recipe for published models should take, by arithmetic: nothing here is measured.

    python -m benchmarks.recipe_cost          prints the table of docs/recipes.md

FLOPs of passes are counted (benchmarks/published.py). How fast a GPU computes them is assumed: `RATE`. Not in
it are text encoders, VAE, rewards, queue and weights, which a run does beside. Memory is that of tensors, in
bfloat16 but for what is trained; each process takes about a GiB more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from benchmarks.published import GIB, MODELS, PassCost, Published, needed_passes, pass_cost
from services.config import Config, LoraConfig
from services.config_file import PROJECT_ROOT, load_config
from services.ray_runtime import whole_gpus

RATE = 300e12
"""FLOP/s of one GPU: about 45 % of what large bfloat16 matmuls reach on an H100."""
COPIES = 7
"""Of what is trained, in float32: the weights, their gradient, two moments, EMA, reference, one in flight."""
VAE_GIB = 0.2
REWARD_GIB = {"geneval": 1.9, "pickscore": 3.7}
"""Of scorers whose network is on a GPU, in float32 (docs/rewards.md)."""


@dataclass(frozen=True)
class RecipeCost:
    """An update."""

    images: int
    rollout_pflop: float
    update_pflop: float
    gpus: int
    seconds: float
    fullest_gib: float
    """Of the GPU that has most to hold, without the activations of sampling."""


def recipe_cost(config: Config, model: Published) -> RecipeCost:
    """Rollouts and updates overlap where they have GPUs of their own; on one GPU they take turns."""
    rollout, learner = config.rollout, config.learner
    cost = _cost(model.name, config.model.height, config.model.width, config.model.lora)
    images = rollout.group_size * learner.groups_per_step
    needed = needed_passes(config)
    # A group in pieces is passed through once more for its weight.
    again = config.objective.timesteps.per_update if _micro_batch(config) < rollout.group_size else 0
    sampling = images * rollout.steps * (2 if rollout.guidance > 1 else 1) * cost.forward
    training = images * (needed["train"] * cost.train + (needed["forward"] + again) * cost.forward)
    gpus = whole_gpus(config)
    if gpus == 1:
        seconds = (sampling + training) / RATE
    else:
        # Groups are not split: the rank with the most of them is waited for.
        largest = math.ceil(learner.groups_per_step / learner.ranks) / learner.groups_per_step
        seconds = max(sampling / rollout.workers, training * largest) / RATE
    return RecipeCost(
        images=images,
        rollout_pflop=sampling / 1e15,
        update_pflop=training / 1e15,
        gpus=gpus,
        seconds=seconds,
        fullest_gib=_fullest(config, model, cost, gpus),
    )


def _micro_batch(config: Config) -> int:
    """`auto` counts as the whole group, which it is where that fits."""
    asked = config.learner.micro_batch
    return config.rollout.group_size if asked == "auto" else asked


def _fullest(config: Config, model: Published, cost: PassCost, gpus: int) -> float:
    weights, encoders = cost.parameters * 2 / GIB, model.text_billions * 1e9 * 2 / GIB
    # Text encoders that are offloaded are there while a prompt is encoded.
    sampler = weights + encoders + VAE_GIB
    rank = weights + COPIES * cost.trained * 4 / GIB + _micro_batch(config) * cost.activations / GIB
    sharing = sampler + sum(REWARD_GIB[reward.name] for reward in config.rewards if reward.num_gpus)
    if config.eval.num_gpus < 1:
        sharing += sampler  # the evaluator has a policy of its own
    return sharing + rank if gpus == 1 else max(sharing, rank)


def published_recipes() -> Iterator[tuple[str, Config, Published]]:
    """Every shipped recipe for a model of the file: its name, itself and the model."""
    models = {model["hub"]: name for name, model in MODELS.items()}
    for path in sorted((PROJECT_ROOT / "recipes").glob("*.yaml")):
        config = load_config(path)
        if config.model.path in models:
            yield path.stem, config, Published.named(models[config.model.path])


def table() -> list[str]:
    """Markdown, a line each."""
    lines = [
        "| recipe | side, pixels | groups | PFLOP to sample | PFLOP to train | GPUs: workers, ranks "
        "| GiB of the fullest | s an update |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, config, model in published_recipes():
        cost, learner, rollout = recipe_cost(config, model), config.learner, config.rollout
        lines.append(
            f"| `{name}` | {config.model.height} | {learner.groups_per_step} x {rollout.group_size} | "
            f"{cost.rollout_pflop:.1f} | {cost.update_pflop:.1f} | "
            f"{cost.gpus}: {rollout.workers}, {learner.ranks} | {cost.fullest_gib:.0f} | {cost.seconds:.0f} |"
        )
    return lines


@cache
def _cost(name: str, height: int, width: int, lora: LoraConfig) -> PassCost:
    return pass_cost(Published.named(name), height, width, lora)


if __name__ == "__main__":
    print("\n".join(table()))  # noqa: T201
