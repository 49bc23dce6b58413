"""Trained weights in shards: each of N ranks holds a part of the rows of every tensor (FSDP2 of torch).

Promises
- `parameters` are plain tensors: this rank's rows, which an optimizer and averages treat like any others.
  A block's rows are gathered before it runs and let go of behind it.
- A forward pass is that of the whole model, bit for bit in float32. In bfloat16 weights travel as bfloat16;
  those of norms, which autocast would leave in float32, are rounded too.
- Gradients are sums over ranks, of this rank's rows.

Every forward and every backward is made by all ranks together, as often on each and with the same weights:
whoever leaves one out makes the others wait (learner/update.py sees to it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard


class Shards:
    """The rows of one rank.

    Args:
        transformer: whose parameters are replaced, block by block, by those of this rank on the mesh's
            device; every one of them is trained.
        mesh: of one dimension, the ranks.
        compute: dtype in which weights are gathered and multiplied; None: their own.
    """

    def __init__(self, transformer: nn.Module, mesh: DeviceMesh, *, compute: torch.dtype | None) -> None:
        on_host = mesh.device_type == "cpu"
        self._host = mesh if on_host else DeviceMesh.from_group(mesh.get_group(), "cpu")
        self.rank: int = mesh.get_local_rank()
        self.count: int = mesh.size()
        # Gradients are added up in float32; autocast casts what goes into a block.
        precision = MixedPrecisionPolicy(
            param_dtype=compute,
            reduce_dtype=None if compute is None else torch.float32,
            cast_forward_inputs=False,
        )
        for module in (*_blocks(transformer), transformer):
            # Also of the whole: what it gathered for one set of weights must not serve another.
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
        modules: list[Any] = [module for module in transformer.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        self._whole: dict[str, Any] = dict(transformer.named_parameters())
        self.shapes: dict[str, torch.Size] = {name: whole.shape for name, whole in self._whole.items()}
        self.parameters: dict[str, nn.Parameter] = {
            name: nn.Parameter(whole.to_local().detach()) for name, whole in self._whole.items()
        }
        self.gathered = _places_of_gathered(modules)
        """Storages that hold gathered weights whenever they are gathered (`_cdata`)."""

    def rows(self, name: str, rank: int) -> slice:
        """Which rows of a tensor are a rank's: those that torch.chunk would give it."""
        whole = self.shapes[name][0]
        each = -(-whole // self.count)
        return slice(min(whole, rank * each), min(whole, (rank + 1) * each))

    def rows_of(self, name: str, rank: int) -> torch.Size:
        """The shape of a rank's rows."""
        rows = self.rows(name, rank)
        return torch.Size((rows.stop - rows.start, *self.shapes[name][1:]))

    def whole(self, name: str, rows: Tensor) -> DTensor:
        """A tensor of which every rank has its rows, as torch.distributed.checkpoint takes it; no copy.

        Args:
            rows: this rank's, on the CPU.
        """
        shape = self.shapes[name]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, self._host, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def take_gradients(self) -> None:
        """What backward passes have added up becomes `.grad` of `parameters`; None where there was none."""
        for name, whole in self._whole.items():
            gradient, whole.grad = whole.grad, None
            self.parameters[name].grad = None if gradient is None else gradient.to_local()

    @contextmanager
    def exchanged(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with other rows: `parameters` and `tensors` change places for the length of the block."""
        self._exchange(tensors)
        try:
            yield
        finally:
            self._exchange(tensors)

    @torch.no_grad()
    def _exchange(self, tensors: Mapping[str, Tensor]) -> None:
        # One after another: no more than one of them is there a third time.
        for name, own in self.parameters.items():
            other = tensors[name]
            kept = own.detach().clone()
            own.copy_(other)
            other.copy_(kept)


def _blocks(transformer: nn.Module) -> list[nn.Module]:
    """What diffusers says must stay together, inner ones first."""
    kinds = set(getattr(transformer, "_no_split_modules", None) or ())
    return [
        module
        for module in reversed(list(transformer.modules()))
        if type(module).__name__ in kinds and next(module.parameters(), None) is not None
    ]


def _places_of_gathered(modules: list[Any]) -> frozenset[int]:
    found = []
    for module in modules:
        module.unshard()
        found += [
            weight.untyped_storage()._cdata
            for weight in module.parameters()
            if not isinstance(weight, DTensor)
        ]
        module.reshard()
    return frozenset(found)
