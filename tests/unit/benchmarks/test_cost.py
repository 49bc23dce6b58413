"""An update costs 3 forward passes a sample and timestep, and one for each distinct reference in use."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost import PROMPT, PassCounter, _jobs
from policy import load_policy
from policy.base import Condition
from services.config_file import load_config


@pytest.mark.parametrize(
    ("recipe", "overrides", "references"),
    [
        # The EMA reference of decay 0 is the policy itself in the first of two optimizer steps.
        ("quickstart", ("objective.kl=0",), 0.5),
        ("quickstart", (), 1.5),
        # A frozen reference is the base of the KL; the clip still is relative to the EMA.
        ("quickstart", ("objective.kl=0", "objective.reference=frozen"), 1.5),
        ("quickstart", ("objective.reference=frozen",), 1.5),
        ("quickstart-flow-grpo", (), 0),
        ("quickstart-flow-grpo", ("objective.kl=0.01",), 1),
        ("quickstart-diffusion-nft", ("objective.kl=0",), 0.5),
    ],
)
def test_forward_passes_of_an_update(
    recipe: str, overrides: tuple[str, ...], references: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(recipe, ["learner.groups_per_step=2", "rollout.group_size=4", *overrides])
    policy = load_policy(config.model, text_encoders=True, vae=False)
    jobs = _jobs(policy, config)
    counter = PassCounter(policy)

    def encode(prompt: str) -> Condition:
        raise AssertionError(f"{prompt}: text is encoded once a group, by whoever samples it")

    monkeypatch.setattr(policy, "encode", encode)
    jobs["update"]()
    pairs = 2 * 4 * config.objective.timesteps.per_update
    assert counter.passes == pairs * (3 + references)


def test_sampling_takes_one_pass_a_solver_step() -> None:
    config = load_config("quickstart", ["learner.groups_per_step=2", "rollout.group_size=4"])
    policy = load_policy(config.model, text_encoders=True, vae=False)
    jobs = _jobs(policy, config)
    counter = PassCounter(policy)
    jobs["sample"]()
    assert counter.passes == 2 * 4 * config.rollout.steps


@pytest.mark.parametrize(
    "train",
    [
        # Frozen weights need no gradient, which pays for the pass that finds the group weight.
        ("model.train=lora", "model.lora.rank=4"),
        # All activations of the group are kept, in host memory: no such pass is needed.
        ("model.train=full", "learner.activation_offload=true"),
    ],
)
def test_an_update_in_pieces_with_a_kl_stays_within_three_passes(train: tuple[str, ...]) -> None:
    """Counted in FLOPs."""
    config = load_config(
        "quickstart",
        [
            *("learner.groups_per_step=2", "rollout.group_size=4", "learner.micro_batch=1"),
            *("learner.optimizer_steps=1", "objective.reference=frozen", "objective.clip_range=null"),
            *train,
        ],
    )
    policy = load_policy(config.model, text_encoders=True, vae=False)
    jobs = _jobs(policy, config)
    x, condition = torch.randn((4, *policy.latent_shape())), policy.encode(PROMPT)
    with torch.inference_mode(), FlopCounterMode(display=False) as forward:
        policy.velocity(x, torch.tensor(500.0), condition)
    with FlopCounterMode(display=False) as update:
        jobs["update"]()
    pairs = 2 * 4 * config.objective.timesteps.per_update
    passes = update.get_total_flops() / (forward.get_total_flops() / 4) / pairs
    reference = 1  # the base is the reference and what the KL is relative to
    assert 2.5 < passes - reference <= 3
