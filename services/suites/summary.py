"""What an evaluation found: by measure and by tag, with standard errors over prompts.

Promises
- A measure is there for every image, or the evaluation has failed before: nothing is averaged over a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.table import Table
from rich.text import Text

from services.formatting import estimate
from services.metrics import Estimate
from services.suites.folder import EvaluationFolder, Sample
from services.suites.statistics import clustered, mean_of_tags

EXACT = ".exact"
"""Ending of a measure that is a rate of exact matches."""


def summarize(folder: EvaluationFolder) -> dict[str, Any]:
    """Means and standard errors by reward, exact rates, the same by tag, and the mean of the tags' means."""
    settings, samples = folder.settings(), folder.samples()
    tagged = {
        tag: [sample for sample in samples if sample.tag == tag]
        for tag in dict.fromkeys(sample.tag for sample in samples if sample.tag is not None)
    }
    by_tag = {tag: _estimates(own) for tag, own in tagged.items()}
    means: dict[str, Estimate] = {}
    if len(tagged) > 1 and sum(map(len, tagged.values())) == len(samples):
        means = {
            name: mean_of_tags({tag: found[name] for tag, found in by_tag.items()})
            for name in _names(samples)
        }
    return {
        "folder": str(folder.root),
        "model": settings.model,
        "weights": settings.kind,
        "suite": settings.suite,
        "prompts": settings.prompts,
        "samples": settings.samples,
        "images": len(samples),
        **_told(_estimates(samples)),
        "tag_mean": _told(means) if means else None,
        "tags": {
            tag: {"prompts": len(clusters(tagged[tag], _names(samples)[0])), **_told(found)}
            for tag, found in by_tag.items()
        },
    }


def table(result: dict[str, Any]) -> Table:
    """The summary for people."""
    title = f"{result['suite']}: {result['prompts']} prompts, {result['samples']} images each"
    sheet = Table(title=Text(title), title_justify="left")
    measures = [(name, "rewards") for name in result["rewards"]]
    measures += [(name, "exact") for name in result["exact"]]
    sheet.add_column("")
    sheet.add_column("prompts", justify="right")
    for name, kind in measures:
        sheet.add_column(Text(name if kind == "rewards" else f"{name} exact"), justify="right")

    def row(label: str, prompts: str, found: dict[str, Any]) -> None:
        cells = [found[kind][name] for name, kind in measures]
        sheet.add_row(Text(label), prompts, *(estimate(cell["mean"], cell["se"]) for cell in cells))

    row("all", str(result["prompts"]), result)
    if result["tag_mean"] is not None:
        row("mean of tags", "", result["tag_mean"])
    for tag, found in result["tags"].items():
        row(tag, str(found["prompts"]), found)
    return sheet


def clusters(samples: Sequence[Sample], name: str) -> list[list[float]]:
    """The values of a measure, prompt by prompt."""
    return [
        [sample.scores[name] for sample in own] for _, own in groupby(samples, lambda sample: sample.place)
    ]


def _names(samples: Sequence[Sample]) -> list[str]:
    return list(samples[0].scores) if samples else []


def _estimates(samples: Sequence[Sample]) -> dict[str, Estimate]:
    return {name: clustered(clusters(samples, name)) for name in _names(samples)}


def _told(found: dict[str, Estimate]) -> dict[str, dict[str, Any]]:
    """Rewards and exact rates apart, as `dgpo eval` has them."""
    told: dict[str, dict[str, Any]] = {"rewards": {}, "exact": {}}
    for name, value in found.items():
        kind = "exact" if name.endswith(EXACT) else "rewards"
        told[kind][name.removesuffix(EXACT)] = value.model_dump()
    return told
