"""Standard errors and intervals against what they are in closed form."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.metrics import Estimate
from services.suites.statistics import bootstrap, clustered, mean_of_tags, resampled_means

values = st.floats(-10, 10, allow_nan=False, width=32)


@given(st.lists(values, min_size=2, max_size=30))
def test_with_one_sample_it_is_the_usual_standard_error(single: list[float]) -> None:
    found = clustered([[value] for value in single])
    assert found.mean == pytest.approx(statistics.mean(single), abs=1e-9)
    assert found.se == pytest.approx(statistics.stdev(single) / math.sqrt(len(single)), abs=1e-9)


@given(st.integers(1, 5), st.lists(st.lists(values, min_size=5, max_size=5), min_size=2, max_size=12))
def test_with_as_many_samples_each_it_is_that_of_the_prompts_means(
    size: int, rows: list[list[float]]
) -> None:
    clusters = [row[:size] for row in rows]
    means = [statistics.mean(row) for row in clusters]
    found = clustered(clusters)
    assert found.mean == pytest.approx(statistics.mean(means), abs=1e-9)
    assert found.se == pytest.approx(statistics.stdev(means) / math.sqrt(len(means)), abs=1e-9)


def test_samples_of_one_prompt_are_no_further_evidence() -> None:
    once, often = clustered([[0.0], [1.0], [1.0]]), clustered([[0.0] * 50, [1.0] * 50, [1.0] * 50])
    assert once.se == pytest.approx(often.se)


def test_unequal_clusters_have_the_cluster_robust_error_of_a_mean() -> None:
    # Residuals sum to -0.75 and 0.75 around 0.75: sqrt(2 / 1 * 2 * 0.75 ** 2) / 4.
    found = clustered([[0.0], [1.0, 1.0, 1.0]])
    assert (found.mean, found.se) == (0.75, pytest.approx(1.5 / 4))


def test_one_prompt_has_no_standard_error() -> None:
    assert clustered([[0.0, 1.0]]) == Estimate(mean=0.5)


def test_tags_count_the_same_whatever_their_size() -> None:
    found = mean_of_tags({"a": Estimate(mean=1.0, se=0.3), "b": Estimate(mean=0.0, se=0.4)})
    assert (found.mean, found.se) == (0.5, pytest.approx(0.25))
    assert mean_of_tags({"a": Estimate(mean=1.0, se=0.3), "b": Estimate(mean=0.0)}).se is None


def test_the_interval_of_two_prompts_is_that_of_all_four_draws() -> None:
    """Means 0, 1/2, 1 with 1/4, 1/2, 1/4: 2.5 % lie below neither end."""
    found = bootstrap([np.array([0.0, 1.0])], confidence=0.95, resamples=10_000, seed=0)
    assert found == (0.5, 0.0, 1.0)
    inner = bootstrap([np.array([0.0, 1.0])], confidence=0.4, resamples=10_000, seed=0)
    assert inner == (0.5, 0.5, 0.5)


def test_the_bootstrap_has_mean_and_error_of_the_mean() -> None:
    sample = np.random.default_rng(5).normal(3.0, 2.0, size=400)
    means = resampled_means(sample, 20_000, np.random.default_rng(0))
    error = sample.std(ddof=0) / math.sqrt(len(sample))
    assert means.mean() == pytest.approx(sample.mean(), abs=5 * error / math.sqrt(20_000))
    assert means.std() == pytest.approx(error, rel=0.03)
    low, high = bootstrap([sample], confidence=0.95, resamples=20_000, seed=0)[1:]
    assert (low, high) == pytest.approx(
        (sample.mean() - 1.96 * error, sample.mean() + 1.96 * error), abs=0.02
    )


def test_the_mean_of_tags_draws_within_each() -> None:
    """One tag of equal values, one of two: half the interval of the second alone."""
    found = bootstrap([np.array([1.0] * 9), np.array([0.0, 1.0])], confidence=0.95, resamples=5000, seed=0)
    assert found == (0.75, 0.5, 1.0)


def test_a_seed_gives_one_interval_and_the_size_of_blocks_none(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = np.random.default_rng(1).random(50)
    whole = bootstrap([sample], confidence=0.9, resamples=1000, seed=3)
    monkeypatch.setattr("services.suites.statistics._ELEMENTS", 120)
    assert bootstrap([sample], confidence=0.9, resamples=1000, seed=3) == whole
    assert bootstrap([sample], confidence=0.9, resamples=1000, seed=4) != whole
