"""How an update is split over ranks: whole groups, in ordinal order, each with its advantages.

Rank 0 takes the groups and knows all rewards, so advantages need no collective, whatever they are relative
to. What is split are the groups that give a gradient, so that no rank has an easy share of groups without a
preference. A rank may get none.

Promises
- The split follows from the groups alone: the same on every run with as many ranks.
- A share arrives as it was sent, bit for bit.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from learner.objectives.base import Measurements, TrainingGroup
from learner.ranks import Order, Ranks, SharedGroup
from services.safetensors_layout import pack, views

T = TypeVar("T")


@dataclass(frozen=True)
class RatedGroup:
    """A group that has a preference."""

    group: TrainingGroup
    advantages: Tensor
    """(G,) float64."""


@dataclass(frozen=True)
class Share:
    """What one rank trains of an update."""

    step: int
    """The update, from 0."""
    groups: int
    """Of the whole update, those without a preference too."""
    live: int
    """Of the whole update, those with a preference."""
    rated: Sequence[RatedGroup]
    """This rank's, in ordinal order."""
    idle: RatedGroup | None = None
    """Where a rank with nothing to train has to make passes: some group to make them of."""


def split(rated: Sequence[T], ranks: int) -> list[Sequence[T]]:
    """In as many runs of neighbours, whose lengths differ by one at most.

    >>> split("abcdefg", 3)
    ['ab', 'cd', 'efg']
    >>> split("a", 2)
    ['', 'a']
    """
    borders = [len(rated) * rank // ranks for rank in range(ranks + 1)]
    return [rated[low:high] for low, high in itertools.pairwise(borders)]


def hand_out(ranks: Ranks, whole: Share, *, idle: bool = False) -> Share:
    """Of rank 0: every other rank is told to train its share of the update; returns rank 0's own.

    Args:
        idle: a rank whose share is empty gets a group to make idle passes of, if there is any.
    """
    parts = split(whole.rated, ranks.count)
    spare = whole.rated[:1] if idle else ()
    orders = [
        Order(
            do="train",
            step=whole.step,
            groups=whole.groups,
            live=whole.live,
            share=_described(part or spare),
            idle=not part,
        )
        for part in parts
    ]
    ranks.order(orders[1:], [_packed(part or spare) for part in parts[1:]])
    own_idle = spare[0] if spare and not parts[0] else None
    return Share(whole.step, whole.groups, whole.live, parts[0], own_idle)


def received(order: Order, payload: Tensor) -> Share:
    """Of the others: the share that came with an order to train."""
    tensors = views(payload.numpy()) if order.share else {}
    rated = []
    for place, described in enumerate(order.share):
        own = {
            name.removeprefix(f"{place}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{place}.")
        }
        condition = {
            name.removeprefix("condition."): own.pop(name)
            for name in list(own)
            if name.startswith("condition.")
        }
        group = TrainingGroup(
            ordinal=described.ordinal,
            latents=own["latents"],
            # Advantages were made of them already.
            rewards={},
            condition=condition,
            sampled_at=described.sampled_at,
            trajectory=own.get("trajectory"),
            log_likelihoods=own.get("log_likelihoods"),
        )
        rated.append(RatedGroup(group, own["advantages"]))
    if order.idle:
        return Share(order.step, order.groups, order.live, (), rated[0] if rated else None)
    return Share(order.step, order.groups, order.live, rated)


def most_passes(
    ranks: Ranks, what: str, own: Callable[[], Mapping[int | None, int]]
) -> dict[int | None, int]:
    """Reference -> passes of the rank that makes most of them with it: the same on all, in the same order.

    Args:
        own: finds those of this rank; references are named by the step of the groups that need them, that
            of now by None.
    """
    most: dict[int | None, int] = {}
    for text in ranks.exchange(what, lambda: json.dumps(list(own().items())).encode()):
        for key, passes in json.loads(text):
            most[key] = max(most.get(key, 0), passes)
    return dict(sorted(most.items(), key=lambda item: -1 if item[0] is None else item[0]))


def sum_gradients(
    ranks: Ranks, what: str, parameters: Sequence[torch.nn.Parameter], accumulate: Callable[[], None]
) -> None:
    """Every rank accumulates; then `.grad` is the sum over all ranks, on each.

    A parameter that no rank has a gradient of keeps none, as it would on one rank: an optimizer does not
    decay what it does not train.
    """

    def present() -> bytes:
        accumulate()
        return bytes(parameter.grad is not None for parameter in parameters)

    heard = ranks.exchange(what, present)
    moved = [parameter for place, parameter in enumerate(parameters) if any(one[place] for one in heard)]
    gradients = []
    for parameter in moved:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    ranks.sum(what, gradients)


def sum_measurements(ranks: Ranks, what: str, own: Measurements) -> Measurements:
    """Of all ranks, added in their order, on each."""
    said = json.dumps([own.pairs, {name: float(value) for name, value in own.sums.items()}]).encode()
    whole = Measurements()
    for text in ranks.exchange(what, lambda: said):
        pairs, sums = json.loads(text)
        whole.add(pairs, **{name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()})
    return whole


def _described(rated: Sequence[RatedGroup]) -> tuple[SharedGroup, ...]:
    return tuple(SharedGroup(ordinal=one.group.ordinal, sampled_at=one.group.sampled_at) for one in rated)


def _packed(rated: Sequence[RatedGroup]) -> bytes:
    tensors: dict[str, Tensor] = {}
    for place, one in enumerate(rated):
        group = one.group
        named = {
            "latents": group.latents,
            "advantages": one.advantages,
            "trajectory": group.trajectory,
            "log_likelihoods": group.log_likelihoods,
            **{f"condition.{name}": tensor for name, tensor in group.condition.items()},
        }
        tensors |= {f"{place}.{name}": tensor for name, tensor in named.items() if tensor is not None}
    return pack(tensors) if tensors else b""
