"""Tensors of which every rank has some rows, brought to rank 0 one after another.

Promises
- Rank 0 holds the rows of no more than one bucket (64 MiB, or one tensor that is larger), and those that it
  sends itself, beside what the caller makes of them; nobody ever holds the whole model.
- They arrive as they were sent, cast to the dtype that was asked for before they travel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learner import ranks as transport
from learner.ranks import Ranks
from services.pieces import in_pieces

if TYPE_CHECKING:
    from policy.sharding import Shards


def gathered(
    ranks: Ranks, what: str, shards: Shards, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, list[Tensor]]]:
    """On rank 0 each tensor's rows, those of every rank in turn; on the others nothing, but they send.

    Every rank calls it with tensors of the same names in the same order, and goes on to its end.

    Args:
        tensors: this rank's rows.
        dtype: of what travels.
    """
    # Ranks send as much as rank 0, which never has fewer rows than another: all make the same buckets.
    widths = {name: shards.rows_of(name, 0).numel() for name in tensors}
    across = shards.count * dtype.itemsize
    buckets = list(in_pieces(tensors, lambda name: widths[name] * across, transport.BUCKET_BYTES))
    largest = max(sum(widths[name] for name in bucket) for bucket in buckets)
    # Made once: whoever takes the rows may still hold the last ones when the next come.
    device = next(iter(tensors.values())).device
    own, *received = torch.zeros(
        ((shards.count if ranks.rank == 0 else 0) + 1, largest), dtype=dtype, device=device
    )
    for bucket in buckets:
        split = [widths[name] for name in bucket]
        size = sum(split)
        for name, place in zip(bucket, own[:size].split(split), strict=True):
            place[: tensors[name].numel()].copy_(tensors[name].detach().reshape(-1))
        # As bytes: not every transport knows every dtype.
        ranks.collect(what, own[:size].view(torch.uint8), [one[:size].view(torch.uint8) for one in received])
        parts = [one[:size].split(split) for one in received]
        for number, name in enumerate(bucket if received else ()):
            shapes = [shards.rows_of(name, rank) for rank in range(shards.count)]
            yield (
                name,
                [
                    part[number][: shape.numel()].view(shape)
                    for part, shape in zip(parts, shapes, strict=True)
                ],
            )
