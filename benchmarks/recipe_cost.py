"""What an update of a recipe for published models should take, by arithmetic: nothing here is measured.

    python -m benchmarks.recipe_cost          prints the table of docs/recipes.md

What is counted and what is assumed is said in services/planning/cost.py. Rewards, queue and weights, which a
run does beside, are not in it; `dgpo plan` has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from services.config import Config, LoraConfig
from services.config_file import PROJECT_ROOT, load_config
from services.demands import whole_gpus
from services.planning.cost import RATE, adapters, memory_of, work_of
from services.planning.published import MODELS, PassCost, Published, pass_cost
from services.planning.step import Shape, share_of


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
    cost = _cost(model.name, config.model.height, config.model.width, adapters(config))
    work, memory, gpus = work_of(config, cost), memory_of(config, model, cost), whole_gpus(config)
    rank = memory.rank + memory.activations
    # An evaluator that has no GPU of its own has a policy of its own.
    sharing = memory.sampler + memory.rewards + (memory.sampler if config.eval.num_gpus < 1 else 0.0)
    if config.cluster.colocate:
        seconds, fullest = (work.sampling + work.training) / RATE, max(memory.sampler, rank) + memory.rewards
    elif gpus == 1:
        seconds, fullest = (work.sampling + work.training) / RATE, sharing + rank
    else:
        shape = Shape(config.learner.groups_per_step, config.queue.max_staleness)
        slowest = share_of(shape, config.learner.ranks) * work.group_training
        seconds, fullest = max(work.sampling / config.rollout.workers, slowest) / RATE, max(sharing, rank)
    return RecipeCost(
        images=work.images,
        rollout_pflop=work.sampling / 1e15,
        update_pflop=work.training / 1e15,
        gpus=gpus,
        seconds=seconds,
        fullest_gib=fullest,
    )


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
def _cost(name: str, height: int, width: int, lora: LoraConfig | None) -> PassCost:
    return pass_cost(Published.named(name), height, width, lora)


if __name__ == "__main__":
    print("\n".join(table()))  # noqa: T201
