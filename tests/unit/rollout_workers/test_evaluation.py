"""One evaluation of a tiny policy: batches, what is measured, and what happens when the weights are gone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from policy import Policy, load_policy
from rollout_workers import evaluation
from rollout_workers.evaluation import evaluate
from rollout_workers.evaluator import Evaluator
from rollout_workers.scoring import GroupScores
from services.card import OwnCard
from services.config import Config, ModelConfig
from services.config_file import load_config
from services.heartbeat import Pulse
from services.messages import PolicyVersion, Prompt, WeightsAnnouncement
from services.metrics import When
from services.policy_store import WeightsGone
from services.prompts import prompt_source


class Scorer:
    """The mean of the pixels; remembers how many images came at once."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[Prompt], *, ordinal: int | None = None
    ) -> GroupScores:
        assert ordinal is None, "an evaluation asks for every reward"
        self.counts.append(len(images))
        return GroupScores({"ocr": tuple(float(image.mean()) for image in images)})


@pytest.fixture
def config(model_config: ModelConfig) -> Config:
    loaded = load_config(
        "quickstart", ["rollout.steps=2", "rollout.group_size=4", "objective.timesteps.first=2",
                       "objective.timesteps.skip=0",
                       "objective.timesteps.per_update=2", "learner.micro_batch=4"]
    )  # fmt: skip
    return loaded.model_copy(update={"model": model_config})


@pytest.fixture
def policy(model_config: ModelConfig) -> Policy:
    return load_policy(model_config, text_encoders=True, vae=True, base=False, seed=0)


def changed(config: Config, section: str, **values: object) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def test_prompts_are_sampled_in_batches_of_the_configured_size(
    config: Config, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = evaluation.sample

    def sample(policy: Policy, condition: Any, negative: Any, seeds: Sequence[int], rollout: Any) -> Any:
        sizes.append(len(seeds))
        return real(policy, condition, negative, seeds, rollout)

    monkeypatch.setattr(evaluation, "sample", sample)
    prompts = prompt_source(config).heldout(99, 7)
    small = evaluate(policy, Scorer(), changed(config, "eval", batch=3), prompts)
    assert sizes == [3, 3, 1]
    whole = evaluate(policy, Scorer(), config, prompts)
    assert sizes[3:] == [7]
    np.testing.assert_allclose(small.images.astype(int), whole.images.astype(int), atol=1)


def test_diversity_is_measured_of_words_alone(config: Config, policy: Policy) -> None:
    prompts = prompt_source(config).heldout(99, 2)
    assert evaluate(policy, Scorer(), config, prompts, with_diversity=True).diversity
    others = changed(config, "prompts", source="file", path=Path("prompts.txt"))
    assert evaluate(policy, Scorer(), others, prompts, with_diversity=True).diversity == {}


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_weights_that_are_gone_are_no_error_of_the_evaluator(when: When) -> None:
    class Sampler:
        def install(self, announcement: WeightsAnnouncement) -> None:
            raise WeightsGone("their learner has died")

    pulse = Pulse("evaluator", lambda beat: None, hang_s=1800)
    evaluator = Evaluator.__new__(Evaluator)
    evaluator.__dict__ |= {
        "_context": Context(),
        "_sampler": Sampler(),
        "_pulse": pulse,
        "_card": OwnCard(),
    }
    told = WeightsAnnouncement(
        version=PolicyVersion(epoch=0, step=0), kind="ema", digest="0" * 32, tensors=1, bytes=4
    )
    assert evaluator.evaluate(told.model_dump_json(), when) is None
    assert pulse.snapshot().state == "waiting for weights", "it would be taken for hung"


class Context:
    """As much of a RunContext as is read before the weights are installed."""

    config = load_config("quickstart")
