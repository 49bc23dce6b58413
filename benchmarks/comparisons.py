"""What is compared: the entries of `dgpo bench compare`, each a recipe with overrides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class BaseModel:
    """A base model to pretrain first, other than the quickstart's."""

    layers: int = 4
    heads: int = 3
    """Of 32 channels each."""
    steps: int = 3000


@dataclass(frozen=True)
class Entry:
    """What is compared."""

    name: str
    recipe: str = "quickstart"
    overrides: tuple[str, ...] = ()
    recorded: int = 0
    """Groups of the quickstart to record first, with the same seed, for a recipe that trains from them."""
    base: BaseModel | None = None
    against: str | None = None
    """Entry that ratios are told to; None: the first."""


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


_CHOSEN = ("objective.clip_range=2.0e-2",)
"""Of the search the setting with which DGPO ended at the highest score; its peers' are in their recipes."""


_FIRST_UPDATES = ("learner.max_steps=72",)
"""Of Flow-GRPO, whose learning rate is constant: how it begins does not depend on how long it goes on."""


def _conditions() -> Iterator[Entry]:
    """One thing differs from the quickstart: what the ratio of DGPO to Flow-GRPO depends on."""
    yield Entry("DGPO", overrides=_CHOSEN)
    for level in ("0.3", "1.0"):
        overrides = (*_FIRST_UPDATES, f"rollout.noise_level={level}")
        yield Entry(f"Flow-GRPO, noise level {level}", "quickstart-flow-grpo", overrides)
    changed: dict[str, tuple[tuple[str, ...], tuple[str, ...], BaseModel | None]] = {
        "20 solver steps": (
            ("rollout.steps=20", "objective.timesteps.first=16", "objective.timesteps.skip=4"),
            ("rollout.steps=20", "objective.timesteps.first=19", "objective.timesteps.per_update=19"),
            None,
        ),
        "guidance 2": (
            ("rollout.guidance=2", "objective.cfg_free=false"),
            ("rollout.guidance=2",),
            None,
        ),
        "half the pretraining": ((), (), BaseModel(steps=1500)),
        # As many steps as in the row above, so that one thing differs between the two.
        "twice the width, half the pretraining": ((), (), BaseModel(heads=6, steps=1500)),
    }
    for what, (dgpo, flow_grpo, base) in changed.items():
        first = f"DGPO, {what}"
        yield Entry(first, overrides=(*_CHOSEN, *dgpo), base=base, against=first)
        peer = (*_FIRST_UPDATES, *flow_grpo)
        yield Entry(f"Flow-GRPO, {what}", "quickstart-flow-grpo", peer, base=base, against=first)


COMPARISONS: dict[str, Comparison] = {
    "search": Comparison(
        tuple(_search()),
        overrides=("eval.every_steps=12",),
        first_seed=100,  # none of those that results are told of
    ),
    "objectives": Comparison(
        (  # each with the setting of the search that ended at the highest score
            Entry("DGPO", overrides=_CHOSEN),
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
    "conditions": Comparison(tuple(_conditions())),
}
