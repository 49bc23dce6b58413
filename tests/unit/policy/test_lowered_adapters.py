"""LoRA beside weights in bfloat16: it multiplies as they do, and is trained in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_case import PROMPT, Case
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from policy.lowered_adapters import LoweredLinear
from policy.pipeline_policy import PipelinePolicy

PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")


class Products(TorchDispatchMode):
    """Dtypes of the matrix products inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if str(func.overloadpacket) in PRODUCTS:
            self.dtypes.append(found.dtype)
        return found


def layer(kind: Any, dtype: torch.dtype) -> Any:
    """One adapted layer; the adapter acts, and is float32."""
    torch.manual_seed(0)
    frozen = torch.nn.Linear(32, 24).to(dtype).requires_grad_(False)
    made = kind(frozen, "default", r=4, lora_alpha=6, config=LoraConfig(r=4, lora_alpha=6))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if ".default." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return made


def passed(adapted: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What it says, and the gradients of the adapter."""
    out = adapted(x)
    (out.float() * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    return out.detach(), [adapted.lora_A.default.weight.grad, adapted.lora_B.default.weight.grad]


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def test_every_product_of_a_model_in_bfloat16_is_in_bfloat16(case: Case) -> None:
    policy: PipelinePolicy = case.load(dtype="bfloat16")
    condition, x = policy.encode(PROMPT), policy.initial_latents([1, 2])
    adapted = [module for module in policy.transformer.modules() if isinstance(module, LoweredLinear)]
    with Products() as forward:
        velocity = policy.velocity(x, torch.tensor(700.0), condition)
    with Products() as backward:
        velocity.square().mean().backward()
    for found in (forward, backward):
        # SANA's linear attention multiplies in float32 by its own will.
        lowered = [dtype for dtype in found.dtypes if dtype == torch.bfloat16]
        assert len(lowered) >= 2 * len(adapted) > 0
        assert case.name == "sana" or set(found.dtypes) == {torch.bfloat16}
    trained = [p for name, p in policy.trainable().items() if ".lora_B." in name and p.grad is not None]
    assert {p.grad.dtype for p in trained if p.grad is not None} == {torch.float32}


def test_it_is_as_exact_as_bfloat16_allows_and_its_gradients_too() -> None:
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2))
    exact, gradients = passed(layer(Linear, torch.float32), x)
    theirs, their_gradients = passed(layer(Linear, torch.bfloat16), x.bfloat16())
    ours, our_gradients = passed(layer(LoweredLinear, torch.bfloat16), x.bfloat16())
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert off(ours, exact) < 2 * off(theirs, exact) < 0.01
    for found, known, wanted in zip(our_gradients, their_gradients, gradients, strict=True):
        assert found.dtype == torch.float32
        assert off(found, wanted) < 0.01
        assert off(known, wanted) < 0.01


def test_with_a_graph_or_without_it_says_the_same() -> None:
    adapted = layer(LoweredLinear, torch.bfloat16)
    x = torch.randn(5, 32).bfloat16()
    with torch.inference_mode():
        known = adapted(x).clone()
    assert torch.equal(passed(adapted, x)[0], known)


@pytest.mark.parametrize("how", ["float32", "off", "merged", "none"])
def test_elsewhere_it_is_pefts_own(how: str) -> None:
    dtype = torch.float32 if how == "float32" else torch.bfloat16
    x = torch.randn(5, 32).to(dtype)
    ours, theirs = layer(LoweredLinear, dtype), layer(Linear, dtype)
    for adapted in (ours, theirs):
        if how == "off":
            adapted._disable_adapters = True
        elif how == "merged":
            adapted.merge()
        elif how == "none":
            adapted.set_adapter([])
    assert torch.equal(ours(x), theirs(x))
