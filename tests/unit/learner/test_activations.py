"""Activations that are offloaded come back unchanged, and weights never leave."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from toy_policy import ToyPolicy, toy_config, training_groups

from learner.activations import offloaded
from learner.update import Updater


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_the_gradient_is_the_same_to_the_bit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))
    x = torch.randn(5, 4)
    expected = gradients(model, x)
    with offloaded([*model.parameters(), *model.buffers()]):
        found = gradients(model, x)
    assert len(found) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_nothing_is_copied_on_a_cpu() -> None:
    weight, x = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    with offloaded([weight]):
        product = x @ weight
    saved = product.grad_fn._saved_mat2  # type: ignore[union-attr]
    assert saved.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    assert product.grad_fn._saved_self.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()  # type: ignore[union-attr]


@pytest.mark.parametrize("offload", [True, False])
def test_activations_are_offloaded_where_the_configuration_says_so(
    offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stay: list[set[int]] = []

    @contextmanager
    def offloaded(weights: Iterable[Tensor]) -> Iterator[None]:
        stay.append({weight.data_ptr() for weight in weights})
        yield

    monkeypatch.setattr("learner.update.offloaded", offloaded)
    policy = ToyPolicy(torch.float32)
    config = toy_config(learner={"activation_offload": offload})
    Updater(policy, config).step(training_groups(2), 0)
    assert bool(stay) == offload
    assert all({weight.data_ptr() for weight in policy.transformer.parameters()} <= told for told in stay)
