"""A learner that cannot start, on a real Ray: the run hears of it soon, in words, and nothing is retried."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.ray_train import LearnerFailed, fit
from services.config_file import load_config
from services.context import RunContext, SecretPlace
from services.embedded import EmbeddedValkey

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(180)]


@pytest.fixture
def make(tmp_path: Path, valkey: EmbeddedValkey, run_name: str):  # type: ignore[no-untyped-def]
    secret = tmp_path / "password"
    secret.write_text(valkey.password)

    def context(*overrides: str) -> RunContext:
        return RunContext(
            run=run_name,
            directory=tmp_path,
            config=load_config("quickstart", overrides),
            queue_url=valkey.url,
            queue_password=SecretPlace(file=secret),
        )

    return context


def test_a_learner_without_a_place_says_what_it_asked_for(make) -> None:  # type: ignore[no-untyped-def]
    context = make("learner.num_cpus=0.5", "learner.num_gpus=1", "cluster.start_deadline_s=3")
    with pytest.raises(LearnerFailed) as caught:
        fit(context, None)
    text = str(caught.value)
    assert "could not be placed: a rank asks for 0.5 CPU and 1 GPU (learner.num_cpus" in text
    assert "within 3 s (cluster.start_deadline_s)" in text
    assert "has 4 CPU and 0 GPU" in text


@pytest.mark.slow
def test_a_model_that_is_not_there_is_not_looked_for_again(make) -> None:  # type: ignore[no-untyped-def]
    context = make("model.path=no/such/model/here", "learner.num_cpus=0.1")
    with pytest.raises(LearnerFailed, match=r"^PolicyError: .*no/such/model/here"):
        fit(context, None)
    log = (context.directory / "logs" / "learner-0.log").read_text()
    assert log.count("failed for good") == 1
