"""Ranks: the processes that make every update together, and how they talk. Nothing of what it is about.

Rank 0 gives orders (`order`), the others wait for them (`next_order`); in between all of them meet in the
same collectives, in the same order.

Promises
- Every wait has a deadline. Where it passes, or a rank is gone, `RankLost` names what was waited for, from
  whom and for how long.
- A rank that fails on its own says so at the next exchange: all end there, the others with its words.
- After a sum or a broadcast all ranks hold the same bits.
- Bytes and tensors travel, never a pickle.

Knows process groups of torch and nothing of Ray, so that tests make ranks of threads.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from services.messages import Message
from services.pieces import in_pieces

T = TypeVar("T")

BUCKET_BYTES = 64 * 1024**2
"""Tensors are joined up to this size, so that small ones do not cost a round trip each; it is also what a sum
takes in memory beside them."""
TAG = 0
HEADER_BYTES = 64
"""Headers are filled up to a multiple of this, which keeps the payload behind them aligned."""


class RankLost(RuntimeError):
    """Another rank is gone or does not answer; a restart goes on from the checkpoint."""


class RankFailed(RuntimeError):
    """Another rank could not do its part; the text is its own."""


class FailedInside(RuntimeError):
    """This rank failed where the others wait for it and cannot be told; the restart of all tells them."""


class RankFailedForGood(RankFailed):
    """The same, of a kind that a restart cannot mend."""


class RanksDiffer(RuntimeError):
    """The ranks no longer hold the same weights."""


class SharedGroup(Message):
    """A group in the payload of an order; its tensors are numbered by its place in the list."""

    ordinal: int
    sampled_at: int | None


class Order(Message):
    """What rank 0 asks of another rank."""

    do: Literal["fit", "train", "compare", "gather", "checkpoint", "settle", "report", "end"]
    step: int = 0
    """Updates behind the weights."""
    groups: int = 0
    """To train: of the whole update, those without a preference too."""
    live: int = 0
    """To train: of the whole update, those with a preference."""
    share: tuple[SharedGroup, ...] = ()
    """To train: the groups of the rank that is told."""
    idle: bool = False
    """To train: its share is empty; what it is given, if anything, is for idle passes."""
    kind: Literal["policy", "ema"] = "policy"
    """To gather: which weights."""
    probe: bool = False
    """To gather: their velocity is announced with them, and all ranks compute it."""
    wait: bool = False
    """To settle a checkpoint: wait until it is written; else only look."""
    reason: str | None = None
    """To end: why the run must end; None where it has been trained to its end."""


class Ranks:
    """One rank's side.

    Args:
        control: process group for bytes on the CPU (gloo).
        data: process group for tensors on the device of the model; may be the same.
        deadline_s: of every wait (learner.rank_deadline_s).
        lasting: errors that a restart cannot mend.
    """

    def __init__(
        self,
        control: Any,
        data: Any,
        *,
        deadline_s: float,
        lasting: tuple[type[BaseException], ...] = (),
    ) -> None:
        self.rank: int = control.rank()
        self.count: int = control.size()
        self.listening = False
        """Of rank 0: the others wait for an order. In the middle of something they would not hear it."""
        self.waited_s = 0.0
        """Seconds spent so far on waiting for other ranks, and on what travelled between them."""
        self._control, self._data = control, data
        self._deadline_s = deadline_s
        self._lasting = lasting

    @property
    def others(self) -> str:
        numbers = [str(rank) for rank in range(self.count) if rank != self.rank]
        return f"rank{'s' * (len(numbers) > 1)} {', '.join(numbers)}"

    def order(
        self, orders: Sequence[Order], payloads: Sequence[bytes] = (), *, deadline_s: float | None = None
    ) -> None:
        """Of rank 0: tell ranks 1, 2, ... what is theirs; returns when all have it.

        Args:
            orders: one each, all to do the same.
            payloads: one each; none: empty ones.
            deadline_s: where it is not that of every wait.
        """
        self.listening = False
        what = f"its taking the order to {orders[0].do} (step {orders[0].step})"
        give_up = time.monotonic() + (deadline_s or self._deadline_s)
        sent = []
        for place, order in enumerate(orders):
            rank, header = place + 1, order.model_dump_json().encode()
            header += b" " * (-len(header) % HEADER_BYTES)
            body = bytearray(header)
            body += payloads[place] if payloads else b""
            sizes = torch.tensor([len(header), len(body)])
            # The tensors are kept until they have arrived.
            for tensor in (sizes, torch.frombuffer(body, dtype=torch.uint8)):
                begin = partial(self._control.send, [tensor], rank, TAG)
                sent.append((rank, tensor, self._named(what, f"rank {rank}", begin)))
        for rank, _, work in sent:
            self._finish(what, f"rank {rank}", work, max(0.001, give_up - time.monotonic()))

    def order_all(self, order: Order, *, payload: bytes = b"", deadline_s: float | None = None) -> None:
        """Of rank 0: tell all other ranks the same."""
        others = self.count - 1
        self.order([order] * others, [payload] * others, deadline_s=deadline_s)

    def settled(self) -> None:
        """Of rank 0: what all were doing is done; the others listen."""
        self.listening = True

    def next_order(self, *, beside_s: float) -> tuple[Order, Tensor]:
        """Of the others: what rank 0 asks next, and the payload (uint8).

        Args:
            beside_s: how much longer than any wait rank 0 may take, for it waits for groups itself.
        """
        sizes = torch.zeros(2, dtype=torch.int64)
        self._receive(sizes, self._deadline_s + beside_s)
        header, whole = sizes.tolist()
        body = torch.empty(whole, dtype=torch.uint8)
        self._receive(body, self._deadline_s)
        return Order.model_validate_json(body[:header].numpy().tobytes()), body[header:]

    def exchange(self, what: str, make: Callable[[], bytes]) -> list[bytes]:
        """What `make` returns on each rank, by rank; called on all of them.

        Raises:
            RankFailed, RankFailedForGood: `make` raised on another rank. On its own it raises what it raised.
        """
        failed: Exception | None = None
        try:
            said = b"+" + make()
        except Exception as error:
            failed = error
            mark = b"!" if isinstance(error, self._lasting) else b"-"
            said = mark + f"{type(error).__name__}: {error}".encode()
        try:
            heard = self._gather(what, said)
        except RankLost:
            if failed is None:
                raise
        if failed is not None:
            raise failed
        for rank, text in enumerate(heard):
            if text[:1] != b"+":
                kind = RankFailedForGood if text[:1] == b"!" else RankFailed
                raise kind(f"rank {rank}: {text[1:].decode(errors='replace')}")
        return [text[1:] for text in heard]

    def sum(self, what: str, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes the sum over all ranks, in place; as many, and of the same shapes, on each."""
        for joined in _joined(tensors):
            self._meet(what, partial(self._data.allreduce, [joined]))

    def broadcast(self, what: str, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes rank 0's, in place."""
        options = torch.distributed.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        for joined in _joined(tensors):
            self._meet(what, partial(self._data.broadcast, [joined], options))

    def collect(self, what: str, tensor: Tensor, into: Sequence[Tensor]) -> None:
        """Bring a tensor of each rank to rank 0; it has the same shape on all.

        Args:
            into: on rank 0 where to, by rank; on the others nothing.
        """
        options = torch.distributed.GatherOptions()
        options.rootRank = 0
        outputs = [list(into)] if self.rank == 0 else []
        self._meet(what, partial(self._data.gather, outputs, [tensor], options))

    @contextmanager
    def meeting(self, what: str, *, alike: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Something in which all ranks meet on their own, in collectives that are not called here.

        Args:
            alike: errors that every rank raises, or none.

        Raises:
            RankLost: one of those failed. A rank that fails for another reason raises that, and takes the
                others along by its end: they are where they could not hear it.
            FailedInside: in place of an error that no restart mends: a rank that ends its work in peace would
                be waited for until the deadline.
        """
        begun = time.monotonic()
        try:
            yield
        except Exception as error:
            lost = isinstance(error, torch.distributed.DistError)
            if lost or (isinstance(error, RuntimeError) and "gloo" in str(error)):
                raise self._lost(what, self.others, begun, self._deadline_s, error) from error
            if isinstance(error, self._lasting) and not isinstance(error, alike):
                raise FailedInside(f"{what}: {type(error).__name__}: {error}") from error
            raise

    def _gather(self, what: str, said: bytes) -> list[bytes]:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        self._meet(what, partial(self._control.allgather, [sizes], [torch.tensor([len(said)])]))
        width = max(int(size) for size in sizes)
        heard = [torch.empty(width, dtype=torch.uint8) for _ in range(self.count)]
        own = torch.frombuffer(bytearray(said.ljust(width)), dtype=torch.uint8)
        self._meet(what, partial(self._control.allgather, [heard], [own]))
        return [one[: int(size)].numpy().tobytes() for one, size in zip(heard, sizes, strict=True)]

    def _receive(self, into: Tensor, deadline_s: float) -> None:
        what = "the next order"
        work = self._named(what, "rank 0", partial(self._control.recv, [into], 0, TAG))
        self._finish(what, "rank 0", work, deadline_s)

    def _meet(self, what: str, begin: Callable[[], Any]) -> None:
        """A collective of all ranks."""
        self._finish(what, self.others, self._named(what, self.others, begin), self._deadline_s)

    def _finish(self, what: str, whom: str, work: Any, deadline_s: float) -> None:
        self._named(what, whom, partial(work.wait, timedelta(seconds=deadline_s)), deadline_s)

    def _named(self, what: str, whom: str, call: Callable[[], Any], limit_s: float = 0.0) -> Any:
        """Call; what torch says of a lost connection or a deadline gets its name."""
        begun = time.monotonic()
        try:
            return call()
        except RuntimeError as error:
            raise self._lost(what, whom, begun, limit_s or self._deadline_s, error) from error
        finally:
            self.waited_s += time.monotonic() - begun

    def _lost(self, what: str, whom: str, begun: float, limit_s: float, error: Exception) -> RankLost:
        return RankLost(
            f"rank {self.rank} waited {time.monotonic() - begun:.1f} s, of {limit_s:g} s at most "
            f"(learner.rank_deadline_s), for {what} from {whom}: {_first_sentence(error)}"
        )


def together(ranks: Ranks | None, what: str, make: Callable[[], T]) -> T:
    """The result of `make`; of several ranks, once all have theirs."""
    if ranks is None:
        return make()
    made: list[T] = []

    def run() -> bytes:
        made.append(make())
        return b""

    ranks.exchange(what, run)
    return made[0]


def _first_sentence(error: Exception) -> str:
    # gloo adds what this typically is, to every one.
    return str(error).partition("\n")[0].partition(". This is typically")[0]


def _joined(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """One flat tensor after another; what is done to it in place has been done to `tensors`."""
    for bucket in _buckets(tensors):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            yield bucket[0].view(-1)
            continue
        joined = torch.cat([tensor.reshape(-1) for tensor in bucket])
        yield joined
        parts = torch.split(joined, [tensor.numel() for tensor in bucket])
        torch._foreach_copy_(bucket, [part.view_as(own) for part, own in zip(parts, bucket, strict=True)])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Of one dtype each, in order; the same ones on every rank."""
    for _, alike in itertools.groupby(tensors, lambda tensor: tensor.dtype):
        yield from in_pieces(alike, lambda tensor: tensor.nbytes, BUCKET_BYTES)
