"""The images of the report: before and after at the same seeds, and groups with rewards and advantages.

Promises
- Nothing is picked by its score: the first held-out prompts, and kept groups at equal distances.
- Advantages are the learner's (ranking.py).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.config import Config
from services.report.ranking import Member, ranked_group
from services.report.samples import (
    EvalSample,
    GroupSample,
    data_uri,
    list_groups,
    load_eval,
    load_eval_images,
    load_group,
)

log = logging.getLogger(__name__)

MAX_PAIRS = 64
MAX_GROUPS = 8
SIDES: Final = ("before", "after")


@dataclass(frozen=True)
class Shot:
    """One image of a pair, and what the rewards said of it."""

    image: str | None
    """Data URI."""
    scores: tuple[tuple[str, float, str], ...]
    """(reward, score, recognised text or "")."""


@dataclass(frozen=True)
class Pair:
    """One held-out prompt at one seed, before and after training."""

    prompt: str
    before: Shot | None
    after: Shot | None


@dataclass(frozen=True)
class ShownGroup:
    """A group, its members from best to worst."""

    step: int
    sample: GroupSample
    members: tuple[Member, ...]
    images: tuple[str, ...]
    """Data URIs, in the order of the group."""
    mean: float
    flat: bool


def pairs(run_dir: Path, config: Config | None, *, after: bool) -> tuple[Pair, ...]:
    """The first held-out prompts, each before and after; either side may be missing.

    Args:
        after: whether there is an evaluation after training; the pictures may be those of a former end.
    """
    if config is None:
        return ()
    size = config.model.width, config.model.height
    told = {when: load_eval(run_dir, when) if after or when == "before" else [] for when in SIDES}
    drawn = {when: load_eval_images(run_dir, when, *size) for when in told}
    longest = told["before"] or told["after"]
    if told["after"] and [s.prompt for s in told["after"]] != [s.prompt for s in longest]:
        log.warning("%s: other prompts after training than before: pairs left out", run_dir)
        return ()
    count = min(MAX_PAIRS, len(longest), max(len(images) for images in drawn.values()))
    return tuple(
        Pair(
            longest[i].prompt,
            *(
                _shot(told[when][i], data_uri(drawn[when][i]) if i < len(drawn[when]) else None)
                if i < len(told[when])
                else None
                for when in SIDES
            ),
        )
        for i in range(count)
    )


def shown_groups(run_dir: Path, config: Config | None) -> tuple[ShownGroup, ...]:
    """At most MAX_GROUPS kept groups, the first and the last and some between."""
    found = list_groups(run_dir)
    if len(found) > MAX_GROUPS:
        found = [found[round(i * (len(found) - 1) / (MAX_GROUPS - 1))] for i in range(MAX_GROUPS)]
    groups = []
    for step, path in found:
        loaded = load_group(path)
        ranked = ranked_group(loaded[0], config) if loaded and config else None
        if loaded is None or ranked is None:
            continue
        images = tuple(data_uri(image) for image in loaded[1])
        groups.append(ShownGroup(step, loaded[0], ranked.members, images, ranked.mean, flat=ranked.flat))
    return tuple(groups)


def _shot(sample: EvalSample, image: str | None) -> Shot:
    scores = tuple(
        (name, score, str(sample.details.get(name, {}).get("text", "")))
        for name, score in sample.scores.items()
    )
    return Shot(image, scores)
