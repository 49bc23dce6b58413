"""What a learner and a sampler have on a device leaves it altogether, and comes back bit for bit."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sharded_runs import state_of, train, trainer_of
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from learner.trainer import PolicyTrainer
from policy import Policy, load_policy
from policy.parking import Parking
from rollout_workers.sampling import sample_trajectory
from services.config_file import load_config

HOME = torch.device("cpu")
"""In a GPU's place: what has left for other memory of the host has left its old memory all the same."""
LARGE = 1024
"""Elements; tables of a schedule and counters are smaller, and may stay."""


def large_tensors() -> list[Tensor]:
    """All that this process has, whoever holds them."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]
    return [tensor for tensor in found if tensor.device.type == "cpu" and tensor.numel() >= LARGE]


def onto_device(policy: Policy) -> None:
    """As a GPU has it: a move there makes buffers anew, which here are views of what was read."""
    parts: list[Any] = [part for part in vars(policy.pipeline).values() if isinstance(part, torch.nn.Module)]
    for part in parts:
        part._apply(torch.clone)


def memory(tensors: list[Tensor]) -> dict[int, Any]:
    """Address -> a weak reference to it, which knows when nobody has it any more."""
    reference: Any = StorageWeakRef
    return {tensor.untyped_storage()._cdata: reference(tensor.untyped_storage()) for tensor in tensors}


def remains(own: dict[int, Any]) -> list[torch.Size]:
    """Shapes of what is still there."""
    return [
        tensor.shape
        for tensor in large_tensors()
        if (found := own.get(tensor.untyped_storage()._cdata)) is not None and not found.expired()
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.train=full",),
        ("model.train=lora", "model.lora.rank=8", "queue.max_staleness=0"),
        ("queue.max_staleness=2", "objective.reference_of=rollout", "objective.reference_decay=0.3"),
    ],
)
def test_nothing_of_a_learner_is_left_on_its_device(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    others = memory(large_tensors()).keys()
    trainer = trainer_of(tmp_path, None, *overrides)
    undisturbed = trainer_of(tmp_path, None, *overrides)
    onto_device(trainer.policy)
    assert train(trainer, range(1)) == train(undisturbed, range(1))
    del undisturbed
    before = {name: tensor.clone() for name, tensor in state_of(trainer).items()}
    copies = memory(list(before.values())).keys()
    of_trainer = {
        place: ref for place, ref in memory(large_tensors()).items() if place not in {*others, *copies}
    }
    assert len(of_trainer) >= len(trainer.updater.trained.parameters)

    parking = Parking(trainer.held, HOME)
    parking.leave()
    assert remains(of_trainer) == []
    away = state_of(trainer)
    assert all(torch.equal(away[name], tensor) for name, tensor in before.items())


def test_an_update_behind_a_move_is_the_one_without(tmp_path: Path) -> None:
    def trained(moves: bool) -> dict[str, Tensor]:
        trainer: PolicyTrainer = trainer_of(tmp_path, None)
        parking = Parking(trainer.held, HOME)
        for step in range(3):
            if moves:
                parking.leave()
                parking.come_back()
            train(trainer, range(step, step + 1))
        return state_of(trainer)

    moved, stayed = trained(True), trained(False)
    assert moved.keys() == stayed.keys()
    assert all(torch.equal(moved[name], tensor) for name, tensor in stayed.items())


def test_nothing_of_a_sampler_is_left_and_it_draws_the_same() -> None:
    others = memory(large_tensors()).keys()
    config = load_config("quickstart")
    policy = load_policy(config.model, text_encoders=True, vae=True, base=False, seed=0)

    onto_device(policy)

    def images() -> NDArray[np.uint8]:
        latents, _ = sample_trajectory(policy, policy.encode("word"), None, [1, 2], config.rollout)
        return policy.decode(latents, batch=2).copy()

    first = images()
    own = {place: ref for place, ref in memory(large_tensors()).items() if place not in others}
    parameters = list(policy.transformer.parameters())
    parking = Parking(policy.held, HOME)
    parking.leave()
    assert own and remains(own) == []
    parking.come_back()
    assert all(now is then for now, then in zip(policy.transformer.parameters(), parameters, strict=True))
    assert np.array_equal(images(), first)


def test_tensors_of_one_memory_stay_of_one_memory() -> None:
    whole = torch.arange(4.0)
    same = whole.view(4)
    parking = Parking(lambda: [whole, same, torch.empty(0)], HOME)
    parking.leave()
    parking.come_back()
    same += 1
    assert torch.equal(whole, torch.arange(4.0) + 1)
