"""What is compared: the entries of `dgpo bench compare`, each a recipe with overrides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """What is compared."""

    name: str
    recipe: str = "quickstart"
    overrides: tuple[str, ...] = ()
    recorded: int = 0
    """Groups of the quickstart to record first, with the same seed, for a recipe that trains from them."""


@dataclass(frozen=True)
class Comparison:
    """Entries, and what holds for all of them."""

    entries: tuple[Entry, ...]
    overrides: tuple[str, ...] = ()
    first_seed: int = 0


def _search() -> Iterator[Entry]:
    """Every objective's recipe, and four settings beside it."""
    decayed, halved = "learner.final_learning_rate=2.0e-5", "learner.learning_rate=2.5e-4"
    searched = {
        "DGPO": (
            "quickstart",
            ("learner.learning_rate=1.25e-4",),
            ("learner.learning_rate=5.0e-4",),
            ("objective.beta=100",),
            ("objective.clip_range=2.0e-2",),
        ),
        "Flow-GRPO": (
            "quickstart-flow-grpo",
            (decayed,),
            ("learner.learning_rate=5.0e-4", decayed),
            ("learner.learning_rate=1.0e-3", decayed),
            ("learner.optimizer_steps=3", decayed),
        ),
        "DiffusionNFT": (
            "quickstart-diffusion-nft",
            ("learner.learning_rate=1.25e-4",),
            (halved,),
            ("objective.beta=1.0", halved),
            ("objective.reference_decay=0.5", halved),
        ),
    }
    for objective, (recipe, *settings) in searched.items():
        yield Entry(objective, recipe)
        for changes in settings:
            named = " ".join(change.partition(".")[2] for change in changes)
            yield Entry(f"{objective}: {named}", recipe, changes)


COMPARISONS: dict[str, Comparison] = {
    "search": Comparison(
        tuple(_search()),
        overrides=("eval.every_steps=12",),
        first_seed=100,  # none of those that results are told of
    ),
    "objectives": Comparison(
        (  # each with the setting of the search that ended at the highest score
            Entry("DGPO", overrides=("objective.clip_range=2.0e-2",)),
            Entry("DGPO, quickstart"),  # clips earlier: more diversity is left
            Entry("Flow-GRPO", "quickstart-flow-grpo"),
            Entry("DiffusionNFT", "quickstart-diffusion-nft"),
        )
    ),
    "ablations": Comparison(
        (
            Entry("as published, but for timesteps.skip 2"),
            Entry("timesteps.skip 0", overrides=("objective.timesteps.skip=0",)),
            Entry(
                "no timestep clip", overrides=("objective.timesteps.first=10", "objective.timesteps.skip=0")
            ),
            Entry("SDE rollouts", overrides=("rollout.solver=sde",)),
            Entry("equal weights", overrides=("advantage.weights=equal",)),
            Entry("independent noise", overrides=("objective.shared_noise=false",)),
            Entry("offline", "offline", recorded=288),  # as many groups as the quickstart trains on
        )
    ),
    "staleness": Comparison(
        (
            *(
                Entry(f"staleness {lag}", overrides=(f"queue.max_staleness={lag}",))
                for lag in (0, 1, 2, 4, 8)
            ),
            *(
                Entry(
                    f"staleness {lag}: reference of the rollout",
                    overrides=(f"queue.max_staleness={lag}", "objective.reference_of=rollout"),
                )
                for lag in (1, 2, 4, 8)
            ),
        )
    ),
}
