"""Two evaluations of the same prompts and seeds: by how much is one better, and how sure is that.

Promises
- Differences are taken image by image: the same prompt, the same seed, hence the same initial noise. What
  does not pair is refused, or left out where that was asked for, and counted.
- Intervals are bootstrap percentiles over prompts, seeded; of a tag over its own prompts, of the mean of tags
  within each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from services.config_file import ConfigError
from services.suites.folder import EvaluationFolder, Sample
from services.suites.statistics import RESAMPLES, bootstrap, clustered
from services.suites.summary import EXACT

Key = tuple[int, int]
"""Place of the prompt, number of the sample."""


def compare(
    first: Path,
    second: Path,
    *,
    common: bool = False,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Second minus first, by reward and by tag.

    Args:
        common: compare the prompts that both have, where they differ.
        confidence: of the intervals.

    Returns:
        By measure {first, second, difference, se, low, high, better, worse} over all prompts, for each tag,
        and for the mean of tags; what else differs between the two.

    Raises:
        ConfigError: one is no evaluation or is not finished, they do not pair, or have no reward in common.
    """
    folders = [EvaluationFolder.open(first), EvaluationFolder.open(second)]
    pairs = _pairs(folders, common)
    names = [name for name in pairs[0][0].scores if name in pairs[0][1].scores]
    if not names:
        raise ConfigError(f"{first} and {second}: have no reward in common")
    interval = {"confidence": confidence, "resamples": resamples, "seed": seed}
    tags = list(dict.fromkeys(pair[0].tag for pair in pairs if pair[0].tag is not None))
    by_tag = {tag: [pair for pair in pairs if pair[0].tag == tag] for tag in tags}
    whole = len(tags) > 1 and sum(map(len, by_tag.values())) == len(pairs)
    a, b = (folder.settings() for folder in folders)
    return {
        "first": {"folder": str(first), "model": a.model, "weights": a.kind},
        "second": {"folder": str(second), "model": b.model, "weights": b.kind},
        "suite": a.suite,
        "prompts": len({pair[0].place for pair in pairs}),
        "images": len(pairs),
        **interval,
        "measures": {name: _difference([pairs], name, interval) for name in names},
        "tag_mean": (
            {name: _difference(list(by_tag.values()), name, interval) for name in names} if whole else None
        ),
        "tags": {
            tag: {name: _difference([own], name, interval) for name in names} for tag, own in by_tag.items()
        },
        "otherwise": list(a.differences(b)),
    }


def _pairs(folders: Sequence[EvaluationFolder], common: bool) -> list[tuple[Sample, Sample]]:
    found: list[dict[Key, Sample]] = []
    for folder in folders:
        missing = folder.missing()
        if missing and not common:
            raise ConfigError(
                f"{folder.root}: not finished, {len(missing)} shards are missing; the same dgpo eval goes on "
                "with it, or --common compares what is there"
            )
        found.append({(sample.place, sample.sample): sample for sample in folder.samples()})
    first, second = found
    both = [key for key in first if key in second and _same(first[key], second[key])]
    alone = len(first) + len(second) - 2 * len(both)
    if not both or (alone and not common):
        raise ConfigError(
            f"{folders[0].root} and {folders[1].root}: {len(both)} of {len(first)} and {len(second)} images "
            "have the same prompt and seed"
            + (": nothing to compare" if not both else "; --common compares those alone")
        )
    return [(first[key], second[key]) for key in sorted(both)]


def _same(first: Sample, second: Sample) -> bool:
    return (first.prompt, first.seed) == (second.prompt, second.seed)


def _difference(
    groups: Sequence[Sequence[tuple[Sample, Sample]]], name: str, interval: Mapping[str, Any]
) -> dict[str, float | None]:
    """One measure over the mean of some groups of pairs."""
    means = [_by_prompt(pairs, name) for pairs in groups]
    differences = [second - first for first, second in means]
    found = bootstrap(differences, **interval)
    every = np.concatenate(differences)
    errors = [clustered([[float(value)] for value in own]).se for own in differences]
    known = [error for error in errors if error is not None]
    return {
        "first": float(np.mean([first.mean() for first, _ in means])),
        "second": float(np.mean([second.mean() for _, second in means])),
        "difference": found.mean,
        "se": float(np.hypot.reduce(known)) / len(known) if len(known) == len(errors) else None,
        "low": found.low,
        "high": found.high,
        "better": float((every > 0).mean()),
        "worse": float((every < 0).mean()),
    }


def _by_prompt(
    pairs: Sequence[tuple[Sample, Sample]], name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(prompts,) means over each prompt's samples, of the first and of the second."""
    clusters: dict[int, list[tuple[float, float]]] = {}
    for first, second in pairs:
        clusters.setdefault(first.place, []).append((first.scores[name], second.scores[name]))
    means = np.array([np.mean(values, axis=0) for values in clusters.values()])
    return means[:, 0], means[:, 1]


def comparison_table(result: Mapping[str, Any]) -> Table:
    """The comparison for people; an interval without 0 is bold."""
    title = (
        f"{result['suite']}: {result['prompts']} prompts, {result['images']} pairs of images; "
        f"{100 * result['confidence']:g} % intervals"
    )
    sheet = Table(title=Text(title), title_justify="left")
    sheet.add_column("")
    for heading in ("first", "second", "difference", "interval", "better", "worse"):
        sheet.add_column(heading, justify="right")
    for name, found in result["measures"].items():
        _row(sheet, _measure(name), found)
        if result["tag_mean"] is not None:
            _row(sheet, "  mean of tags", result["tag_mean"][name])
        for tag, own in result["tags"].items():
            _row(sheet, f"  {tag}", own[name])
    return sheet


def _measure(name: str) -> str:
    return f"{name.removesuffix(EXACT)} exact" if name.endswith(EXACT) else name


def _row(sheet: Table, label: str, found: Mapping[str, float]) -> None:
    sure = found["low"] > 0 or found["high"] < 0
    sheet.add_row(
        Text(label),
        f"{found['first']:.3f}",
        f"{found['second']:.3f}",
        Text(f"{found['difference']:+.3f}", style="bold" if sure else ""),
        f"{found['low']:+.3f} to {found['high']:+.3f}",
        f"{100 * found['better']:.0f} %",
        f"{100 * found['worse']:.0f} %",
    )
