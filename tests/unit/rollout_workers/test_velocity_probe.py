"""From the learner's announcement to a worker's comparison, on the quickstart's model, without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from learner.prober import Prober
from learner.trainer import PolicyTrainer
from policy import load_policy
from policy.errors import PolicyError
from policy.probe import VelocityDrift
from rollout_workers.policy_sampler import PolicySampler
from services.config import Config
from services.config_file import ConfigError, load_config
from services.context import RunContext
from services.messages import PolicyVersion, WeightsAnnouncement
from services.safetensors_layout import Bytes

LORA = ("model.train=lora", "model.lora.rank=4", "model.lora.alpha=8")


class Store:
    """A weights transport within the process."""

    def send(self, announcement: WeightsAnnouncement, payload: Bytes) -> None:
        self.payload = payload.copy()

    def receive(self, announcement: WeightsAnnouncement) -> Bytes | None:
        return self.payload

    def reclaim(self, kind: str) -> Bytes | None:
        return None

    def close(self) -> None:
        del self.payload


def config(*overrides: str) -> Config:
    return load_config("quickstart", list(overrides))


def version(step: int, epoch: int = 0) -> PolicyVersion:
    return PolicyVersion(epoch=epoch, step=step)


@pytest.mark.parametrize("train", [LORA, ("model.train=full",)])
def test_a_worker_computes_the_velocity_of_what_was_published(train: tuple[str, ...], tmp_path: Path) -> None:
    own, store = config(*train, "objective.switch_step=2", "queue.max_staleness=0"), Store()
    trainer = PolicyTrainer(RunContext(run="r", directory=tmp_path, config=own, queue_url=""), store)
    # Once the policy has moved on, rollouts sample with the reference: what is published is not what is held.
    with torch.no_grad():
        for parameter in trainer.policy.trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy = trainer.publish(version(1), kind="policy")
    reference = trainer.publish(version(2), kind="policy")
    assert policy.probe is not None and reference.probe is not None
    assert policy.probe != reference.probe
    sampler = PolicySampler(own, tmp_path, store)
    assert sampler.install(reference) == 0.0
    told = WeightsAnnouncement.model_validate_json(
        trainer.publish(version(1), kind="policy").model_dump_json()
    )
    assert sampler.install(told) == 0.0
    if own.model.train == "lora":
        lora = own.model.lora.model_copy(update={"alpha": 12.0})
        other = own.model_copy(update={"model": own.model.model_copy(update={"lora": lora})})
        sampler = PolicySampler(other, tmp_path, store)
    else:  # every weight is published: only what is no weight can differ
        sampler.policy.transformer.get_buffer("pos_embed.pos_embed").mul_(1.1)
    with pytest.raises(VelocityDrift, match=r"weights policy 0\.1: .* of its length, and at most 0\.003"):
        sampler.install(told)
    assert sampler.install(told.model_copy(update={"probe": None})) is None


def test_the_first_weights_of_an_epoch_carry_a_probe_and_every_kth_after() -> None:
    own = config(*LORA, "learner.probe_every=3")
    policy = load_policy(own.model, text_encoders=False, vae=False)
    prober = Prober(policy, own)

    def due(step: int, epoch: int, kind: str = "policy") -> bool:
        return prober.of(policy.trainable(), version(step, epoch), kind=kind) is not None

    assert [due(step, 0) for step in range(5)] == [True, False, False, True, False]
    assert [due(step, 1) for step in range(4, 7)] == [True, False, True]
    assert [due(4, 1, "ema"), due(5, 1, "ema")] == [True, False]
    never = Prober(policy, config(*LORA, "learner.probe_every=0"))
    assert never.of(policy.trainable(), version(0), kind="policy") is None
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in policy.tensors().items()}
    with pytest.raises(PolicyError, match=r"weights policy 2\.0: .* not finite"):
        prober.of(broken, version(0, 2), kind="policy")
    with pytest.raises(ConfigError, match=r"probe_tolerance does nothing with learner\.probe_every 0"):
        config("learner.probe_every=0", "rollout.probe_tolerance=0.1")
