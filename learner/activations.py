"""What the backward pass needs of the forward pass, kept in host memory until then.

Promises
- The gradient is the same, bit for bit: tensors go and come back unchanged.
- Weights stay where they are: only what a forward pass made is moved.
- On a CPU nothing is copied: it is in host memory already.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def offloaded(weights: Iterable[Tensor], gathered: Container[int] = ()) -> Iterator[None]:
    """Graphs recorded in here keep their activations in host memory (pinned where there is a GPU).

    Copies are queued on the stream that computes, so nothing waits for them and nothing is read too early.

    Args:
        weights: parameters and buffers of the model, and whatever else outlives the graph.
        gathered: storages (`_cdata`) that hold weights whenever they are needed.
    """
    stay = {weight.untyped_storage().data_ptr() for weight in weights}

    def pack(saved: Tensor) -> tuple[torch.device, Tensor]:
        storage = saved.untyped_storage()
        if saved.device.type == "cpu" or storage.data_ptr() in stay or storage._cdata in gathered:
            return saved.device, saved
        host = torch.empty_like(saved, device="cpu", pin_memory=saved.device.type == "cuda")
        return saved.device, host.copy_(saved, non_blocking=True)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, kept = packed
        return kept.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
