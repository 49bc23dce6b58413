"""Activations that are offloaded come back unchanged, and weights never leave."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from learner.activations import offloaded


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
