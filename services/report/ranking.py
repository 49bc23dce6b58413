"""A kept group as it is shown: its samples from best to worst, with rewards and advantages.

Promises
- Order and advantages are computed by the learner's own code: the writer of a group does not know them. What
  the learner divides by a deviation over its whole step is divided by the group's here.
- Knows nothing of images.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from services.config import Config
from services.report.samples import GroupSample

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """One sample of a group."""

    place: int
    """Its place in the group, from 0."""
    total: float
    advantage: float
    scores: tuple[tuple[str, float], ...]
    """(reward, score) of each reward that is not the total itself."""
    text: str
    best: bool
    worst: bool


@dataclass(frozen=True)
class RankedGroup:
    """The samples of a group, from best to worst."""

    members: tuple[Member, ...]
    mean: float
    flat: bool
    """No sample is better than another: the group teaches nothing."""


def ranked_group(sample: GroupSample, config: Config) -> RankedGroup | None:
    """None where the group lacks a reward that the run trains on."""
    from learner.advantages import group_advantages, preferences, total_rewards

    try:
        totals = total_rewards(sample.rewards, config.trained_rewards)
    except ValueError as error:
        log.warning("group %d left out: %s", sample.ordinal, error)
        return None
    preferred = preferences([sample.rewards], config.trained_rewards, config.advantage)
    found = group_advantages(preferred, config.advantage)
    flat = not bool(found.live[0])
    return _ranked(sample, totals.tolist(), preferred[0].tolist(), found.values[0].tolist(), config, flat)


def _ranked(
    sample: GroupSample,
    totals: list[float],
    preferred: list[float],
    advantages: list[float],
    config: Config,
    flat: bool,
) -> RankedGroup:
    speaker = next((one.name for one in config.trained_rewards if sample.details.get(one.name)), None)
    order = sorted(range(len(totals)), key=lambda i: (-preferred[i], i))
    members = tuple(
        Member(
            place=i,
            total=totals[i],
            advantage=advantages[i],
            scores=tuple(
                (name, scores[i]) for name, scores in sample.rewards.items() if list(scores) != totals
            ),
            text=str(sample.details[speaker][i].get("text", "")) if speaker else "",
            best=not flat and i == order[0],
            worst=not flat and i == order[-1],
        )
        for i in order
    )
    return RankedGroup(members, sum(totals) / len(totals), flat)
