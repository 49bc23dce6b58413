"""Moving all that a process keeps on its device to host memory and back, in place.

Promises
- Tensors stay the objects they are: parameters in a module, moments in an optimizer. Only where their
  elements lie changes, and not a bit of them.
- Behind `leave` nothing of it takes memory on the device. A GPU's context stays, some hundred MB.
- What is on the host by intent (`model.text_encoders: cpu`) stays there.

Where the device is the host, elements are copied to other memory all the same: nothing is saved, and the way
is the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

HOST = torch.device("cpu")


class Parking:
    """What a process keeps on one device.

    Args:
        tensors: all that it keeps now; asked again at each `leave`.
        home: the device.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], home: torch.device) -> None:
        self._tensors, self._home = tensors, home
        self._away: list[Tensor] = []

    def leave(self) -> None:
        """To host memory."""
        distinct = {id(tensor): tensor for tensor in self._tensors()}.values()
        self._away = [tensor for tensor in distinct if tensor.device.type == self._home.type]
        _move(self._away, HOST)
        if self._home.type == "cuda":
            # What torch keeps for later would be missing to whoever has the next turn.
            torch.cuda.empty_cache()

    def come_back(self) -> None:
        """What has left, onto the device."""
        _move(self._away, self._home)
        self._away = []


def _move(tensors: Iterable[Tensor], device: torch.device) -> None:
    moved: dict[tuple[object, ...], Tensor] = {}
    for tensor in tensors:
        # Tensors that are the same memory stay so.
        memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else None
        if memory is None or memory not in moved:
            copy = tensor.detach().to(device, copy=True)
            if memory is not None:
                moved[memory] = copy
        else:
            copy = moved[memory]
        tensor.data = copy
