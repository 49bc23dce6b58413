"""Means over prompts, how sure they are, and differences of two evaluations of the same prompts.

Promises
- Prompts are what is drawn at random: samples of one prompt are one cluster, and never count as more evidence
  than they are.
- The bootstrap is seeded: the same values give the same interval on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.metrics import Estimate

Clusters = Sequence[Sequence[float]]
"""Values of each prompt's samples."""
RESAMPLES = 10_000
_ELEMENTS = 4_000_000
"""Of a block of resamples that is in memory at once."""


class Interval(NamedTuple):
    """A difference, and where the bootstrap puts it."""

    mean: float
    low: float
    high: float


def clustered(clusters: Clusters) -> Estimate:
    """The mean over all values and its standard error, clustered by prompt.

    With as many samples of each prompt it is the standard error of the prompts' means; with one sample the
    usual one. No error where there is one prompt alone.

    >>> clustered([[0.0, 1.0], [1.0, 1.0]])
    Estimate(mean=0.75, se=0.25)
    """
    count, prompts = sum(map(len, clusters)), len(clusters)
    mean = math.fsum(value for cluster in clusters for value in cluster) / count
    if prompts < 2:
        return Estimate(mean=mean)
    # Of the cluster-robust variance of a mean, with its correction for few clusters.
    squares = math.fsum(math.fsum(value - mean for value in cluster) ** 2 for cluster in clusters)
    return Estimate(mean=mean, se=math.sqrt(squares * prompts / (prompts - 1)) / count)


def mean_of_tags(tags: Mapping[str, Estimate]) -> Estimate:
    """The mean of the tags' means, each tag counting the same: GenEval's overall score."""
    means = [estimate.mean for estimate in tags.values() if estimate.mean is not None]
    errors = [estimate.se for estimate in tags.values() if estimate.se is not None]
    mean = math.fsum(means) / len(means)
    if len(errors) < len(tags):
        return Estimate(mean=mean)
    return Estimate(mean=mean, se=math.hypot(*errors) / len(errors))


def resampled_means(
    values: NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(resamples,) means of as many values drawn with replacement.

    Args:
        values: (prompts,).
    """
    block = max(1, _ELEMENTS // len(values))
    parts = [
        values[rng.integers(len(values), size=(min(block, resamples - first), len(values)))].mean(axis=1)
        for first in range(0, resamples, block)
    ]
    return np.concatenate(parts)


def bootstrap(
    groups: Sequence[NDArray[np.float64]], *, confidence: float, resamples: int, seed: int
) -> Interval:
    """The mean of the groups' means, and the percentile interval of it with prompts drawn within each group.

    Args:
        groups: (prompts,) differences each; one group for a plain mean, one a tag for the mean of tags.
        confidence: 0.95, say.
    """
    rng = np.random.default_rng(seed)
    means = np.mean([resampled_means(group, resamples, rng) for group in groups], axis=0)
    outside = (1 - confidence) / 2
    low, high = np.quantile(means, [outside, 1 - outside])
    return Interval(float(np.mean([group.mean() for group in groups])), float(low), float(high))
