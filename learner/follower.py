"""The ranks beside rank 0: what they do is what it orders; and how all of them find out that they agree.

Promises
- They take nothing from the queue, acknowledge nothing and announce nothing. Of weights and checkpoints they
  send and write their own rows, where they hold rows, and nothing else.
- Weights that differ between ranks end the run: an update behind them would be of no known policy.

Knows no Ray: reporting to it is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learner.gathering import gathered
from learner.prober import probe_published
from learner.ranks import Order, Ranks, RanksDiffer
from learner.sharded_checkpoint import ShardedCheckpointWriter
from learner.shares import received
from learner.update import Updater
from policy.base import Policy
from policy.errors import PolicyError
from services.codec import weights_digest
from services.heartbeat import Pulse
from services.safetensors_layout import views

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def follow(
    ranks: Ranks,
    updater: Updater,
    pulse: Pulse,
    *,
    beside_s: float,
    report: Callable[[], None],
    writer: ShardedCheckpointWriter | None = None,
) -> str | None:
    """Do what rank 0 orders, to the end.

    Args:
        beside_s: how much longer than any wait rank 0 may take between two orders.
        report: rank 0 reports to Ray Train, which waits for all ranks.
        writer: of this rank's rows, where the weights are sharded.

    Returns:
        Why the run must end, as rank 0 says; None: it has been trained to its end.
    """
    while True:
        pulse.enter("waiting for rank 0", waits=True)
        order, payload = ranks.next_order(beside_s=beside_s)
        if order.do == "end":
            return order.reason
        if order.do == "train":
            pulse.enter(f"updating to step {order.step + 1}")
            updater.follow(received(order, payload))
            pulse.groups += len(order.share)
        elif order.do == "fit":
            pulse.enter("finding the micro-batch that fits")
            updater.fit(dict(views(payload.numpy())))
        elif order.do == "compare":
            pulse.enter(f"comparing the weights of step {order.step}")
            compare(ranks, f"step {order.step}", updater.trained.replicated())
        elif order.do == "gather":
            pulse.enter(f"sending the rows of step {order.step}")
            if order.probe:
                probe_together(ranks, updater, order.kind, order.step)
            for _ in gather(ranks, updater, order.kind, order.step):
                raise AssertionError("rows arrive at rank 0 alone")
        elif order.do == "checkpoint":
            assert writer is not None
            writer.begin(order.step, updater.state())
        elif order.do == "settle":
            assert writer is not None
            pulse.enter(f"finishing the checkpoint of step {order.step}")
            writer.settle(wait=order.wait)
        else:
            report()


def gather(ranks: Ranks, updater: Updater, kind: str, step: int) -> Iterator[tuple[str, list[Tensor]]]:
    """Of every rank: the rows of what is published, at rank 0; see learner/gathering.py."""
    shards, dtype = updater.policy.shards, getattr(torch, updater.config.learner.publish_dtype)
    assert shards is not None
    return gathered(ranks, f"the weights of step {step}", shards, updater.published(kind, step), dtype)


def probe_together(ranks: Ranks, updater: Updater, kind: str, step: int) -> tuple[float, ...]:
    """Of every rank whose weights are shards: the probe of what is published, the same on all.

    Raises:
        PolicyError: the velocity is not finite, on every rank.
    """
    tensors, weights = updater.published(kind, step), f"{kind} of step {step}"
    with ranks.meeting(f"the velocity of the weights {weights}", alike=(PolicyError,)):
        return probe_published(updater.policy, tensors, updater.config, weights)


def order_comparison(ranks: Ranks, step: int, updater: Updater) -> None:
    """Of rank 0: all ranks compare the weights behind this many updates.

    Raises:
        RanksDiffer: they are not the same, on every rank.
    """
    ranks.order_all(Order(do="compare", step=step))
    compare(ranks, f"step {step}", updater.trained.replicated())
    ranks.settled()


def begin_together(ranks: Ranks, updater: Updater) -> None:
    """On every rank, once: all continue from rank 0's state, with the same frozen weights.

    Raises:
        RanksDiffer: another rank has loaded another model.
    """
    updater.take_from_rank_0()
    policy = updater.policy
    if policy.shards is None:
        with policy.base() if updater.config.objective.needs_base else nullcontext():
            compare(ranks, "the start, of the frozen model,", policy.transformer.state_dict())
        state = updater.state()
        trained = {f"{part}.{name}": tensor for part, held in state.items() for name, tensor in held.items()}
        compare(ranks, "the start", trained)
    else:
        compare(ranks, "the start", updater.trained.replicated())
    ranks.settled()


def shard_together(ranks: Ranks, policy: Policy, mesh: DeviceMesh, *, base: bool) -> None:
    """On every rank, once, behind the loading: what all of them hold is divided among them.

    Args:
        mesh: of the ranks, by number.
        base: as for `Policy.shard`.

    Raises:
        RanksDiffer: another rank has loaded another model.
    """
    # Once divided, no two ranks hold anything that could be compared.
    compare(ranks, "the start, of the loaded model,", policy.transformer.state_dict())
    with ranks.meeting("the division of the weights"):
        policy.shard(mesh, base=base)


def compare(ranks: Ranks, when: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises RanksDiffer, on every rank, where these tensors are not the same on all of them, bit for bit."""
    digests = ranks.exchange(f"the weights at {when}", lambda: weights_digest(tensors).encode())
    odd = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if odd:
        shown = ", ".join(digest.decode()[:16] for digest in digests)
        raise RanksDiffer(
            f"at {when} rank {', '.join(odd)} holds other weights than rank 0 (digests by rank: {shown}): "
            "its machine computes wrongly, or has another model, device or version of torch. Checkpoints are "
            "compared before they are written: mend or leave out the machine and resume"
        )
