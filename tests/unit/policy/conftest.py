"""Every family in turn, built once for all tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tiny_pipelines import TINY, VARIANTS

if TYPE_CHECKING:
    from family_case import Case

    from policy.pipeline_policy import PipelinePolicy


@pytest.fixture(scope="session", params=list(TINY))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    from family_case import Case

    tiny = (TINY | VARIANTS)[request.param]
    directory = tmp_path_factory.mktemp("tiny") / request.param
    # The same weights whatever else was run before: what rounding does depends on them.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny.build(directory)
    return Case(request.param, tiny, directory)


@pytest.fixture(scope="session")
def policy(case: Case) -> PipelinePolicy:
    """Nothing in here trains it."""
    return case.load()
