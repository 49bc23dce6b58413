"""Every family in shards on two ranks: its velocities and gradients are those of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from family_case import PROMPT, SEEDS
from tiny_pipelines import TINY
from torch import Tensor

from policy import Policy, load_policy
from tests.ranks_of_processes import each_of, mesh_of

FAMILIES = [name for name in TINY if name != "flux-schnell"]
TIME = torch.tensor(600.0)


def gradient(policy: Policy, x: Tensor, share: float) -> dict[str, Tensor]:
    """Of a sum over the samples, times `share`; with shards, this rank's rows of the sum over ranks."""
    toward = torch.linspace(-1, 1, x.numel()).view_as(x)
    loss = (policy.velocity(x, TIME, policy.encode(PROMPT)) * toward).sum() * share
    loss.backward()  # type: ignore[no-untyped-call]
    if policy.shards is not None:
        policy.shards.take_gradients()
    found = {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}
    for parameter in policy.trainable().values():
        parameter.grad = None
    return found


@torch.no_grad()
def velocity(policy: Policy, x: Tensor) -> Tensor:
    return policy.velocity(x, TIME, policy.encode(PROMPT))


def compared(folder: Path, rank: int) -> None:
    for name, dtype in [*((name, "float32") for name in FAMILIES), (FAMILIES[0], "bfloat16")]:
        config = TINY[name].config(folder / name, train="full", dtype=dtype)
        policy = load_policy(config, text_encoders=True, vae=False, base=False, to_shard=True)
        x = policy.initial_latents(SEEDS)
        whole, slopes, weights = velocity(policy, x), gradient(policy, x, 1.0), policy.tensors()
        policy.shard(mesh_of(dist.group.WORLD))
        shards = policy.shards
        assert shards is not None
        blocks = sum(hasattr(module, "unshard") for module in policy.transformer.modules())
        assert blocks > 1, f"{name}: {blocks} blocks"
        exact = dtype == "float32"
        close = {} if exact else {"rtol": 0.1, "atol": 0.05 * float(whole.abs().max())}
        for values in (velocity(policy, x), velocity(policy, x)):
            torch.testing.assert_close(values, whole, **close)
            assert not exact or torch.equal(values, whole), name
        moved = {key: tensor + 0.05 for key, tensor in policy.tensors().items()}
        with policy.swapped(moved):
            assert not torch.equal(velocity(policy, x), whole)
            with policy.base():
                torch.testing.assert_close(velocity(policy, x), whole, **close)
        # Each of two ranks brings half of the sum.
        own = gradient(policy, x, 0.5)
        assert own.keys() == slopes.keys()
        for key, rows in own.items():
            assert torch.equal(policy.trainable()[key].detach(), weights[key][shards.rows(key, rank)]), key
            wanted = slopes[key][shards.rows(key, rank)]
            width = float(slopes[key].abs().max())
            limit = {"rtol": 1e-4, "atol": 1e-5 * width} if exact else {"rtol": 0.2, "atol": 0.1 * width}
            torch.testing.assert_close(rows, wanted, **limit)
        policy.checkpoint_gradients()
        again = gradient(policy, x, 0.5)
        assert again.keys() == own.keys()
        assert all(torch.equal(again[key], rows) for key, rows in own.items()), name


@pytest.mark.slow
def test_velocities_and_gradients_are_those_of_the_whole_model(tmp_path: Path) -> None:
    for name in FAMILIES:
        TINY[name].build(tmp_path / name)
    each_of(2, compared, tmp_path)
