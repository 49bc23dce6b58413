"""The ranks beside rank 0: what they do is what it orders; and how all of them find out that they agree.

Promises
- They take nothing from the queue, acknowledge nothing, publish nothing and write no checkpoint.
- Weights that differ between ranks end the run: an update behind them would be of no known policy.

Knows no Ray: reporting to it is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

from torch import Tensor

from learner.ranks import Order, Ranks, RanksDiffer
from learner.shares import received
from learner.update import Updater
from services.codec import weights_digest
from services.heartbeat import Pulse
from services.safetensors_layout import views


def follow(
    ranks: Ranks, updater: Updater, pulse: Pulse, *, beside_s: float, report: Callable[[], None]
) -> str | None:
    """Do what rank 0 orders, to the end.

    Args:
        beside_s: how much longer than any wait rank 0 may take between two orders.
        report: rank 0 reports to Ray Train, which waits for all ranks.

    Returns:
        Why the run must end, as rank 0 says; None: it has been trained to its end.
    """
    while True:
        pulse.enter("waiting for rank 0")
        order, payload = ranks.next_order(beside_s=beside_s)
        if order.do == "end":
            return order.reason
        if order.do == "train":
            pulse.enter(f"updating to step {order.step + 1}")
            updater.follow(received(order, payload))
            pulse.groups += len(order.share)
        elif order.do == "fit":
            pulse.enter("finding the micro-batch that fits")
            updater.settle(order.micro_batch, dict(views(payload.numpy())))
        elif order.do == "compare":
            pulse.enter(f"comparing the weights of step {order.step}")
            compare(ranks, f"step {order.step}", updater.policy.trainable())
        else:
            report()


def order_comparison(ranks: Ranks, step: int, updater: Updater) -> None:
    """Of rank 0: all ranks compare the weights behind this many updates.

    Raises:
        RanksDiffer: they are not the same, on every rank.
    """
    ranks.order_all(Order(do="compare", step=step))
    compare(ranks, f"step {step}", updater.policy.trainable())
    ranks.settled()


def begin_together(ranks: Ranks, updater: Updater) -> None:
    """On every rank, once: all continue from rank 0's state, with the same frozen weights.

    Raises:
        RanksDiffer: another rank has loaded another model.
    """
    updater.take_from_rank_0()
    policy = updater.policy
    with policy.base() if updater.config.objective.needs_base else nullcontext():
        compare(ranks, "the start, of the frozen model,", policy.transformer.state_dict())
    state = updater.state()
    trained = {f"{part}.{name}": tensor for part, held in state.items() for name, tensor in held.items()}
    compare(ranks, "the start", trained)
    ranks.settled()


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
