"""How ranks talk: what arrives is what was sent, and what does not arrive has a name."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from ranks_of_threads import Rigged, all_of, together
from torch import Tensor

from learner import ranks as module
from learner.ranks import FailedInside, Order, RankFailed, RankFailedForGood, RankLost, Ranks, SharedGroup


@pytest.mark.parametrize("count", [2, 4])
def test_every_rank_hears_what_every_rank_says(count: int) -> None:
    said = [b"", b"one", b"\x00" * 70_000, b"three "][:count]
    heard = all_of(together(count, lambda ranks: ranks.exchange("words", lambda: said[ranks.rank])))
    assert heard == [said] * count


def test_orders_arrive_in_order_each_with_its_own_payload() -> None:
    def body(ranks: Ranks) -> list[tuple[Order, bytes]]:
        first = [Order(do="train", share=(SharedGroup(ordinal=rank, sampled_at=None),)) for rank in (1, 2)]
        if ranks.rank == 0:
            ranks.order(first, [b"a" * 5, b""])
            assert not ranks.listening
            ranks.settled()
            ranks.order_all(Order(do="end", reason="enough"))
            return []
        found = [ranks.next_order(beside_s=1) for _ in range(2)]
        return [(order, payload.numpy().tobytes()) for order, payload in found]

    _, one, two = all_of(together(3, body))
    assert [order.do for order, _ in one] == ["train", "end"]
    assert [order.share[0].ordinal for order, _ in (one[0], two[0])] == [1, 2]
    assert [payload for _, payload in one + two] == [b"aaaaa", b"", b"", b""]
    assert one[1][0].reason == "enough"


@pytest.mark.parametrize("bucket", [16, 10**6])
def test_sums_and_broadcasts_leave_the_same_bits_everywhere(
    bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUCKET_BYTES", bucket)
    shapes = [(3, 2), (1,), (4,), (2, 5)]

    def of(rank: int) -> list[Tensor]:
        made = torch.Generator().manual_seed(rank)
        tensors = [torch.randn(shape, generator=made) for shape in shapes]
        return [*tensors[:2], tensors[2].double(), tensors[3].T]

    def body(ranks: Ranks) -> tuple[list[Tensor], list[Tensor]]:
        summed, sent = of(ranks.rank), of(ranks.rank)
        ranks.sum("numbers", summed)
        ranks.broadcast("numbers", sent)
        return summed, sent

    found = all_of(together(3, body))
    for place, expected in enumerate(of(0)):
        for summed, sent in found:
            assert torch.equal(summed[place], found[0][0][place])
            assert torch.equal(sent[place], expected)
            torch.testing.assert_close(summed[place], of(0)[place] + of(1)[place] + of(2)[place])


@pytest.mark.parametrize(("error", "kind"), [(MemoryError, RankFailed), (Rigged, RankFailedForGood)])
def test_a_rank_that_fails_tells_the_others_why(error: type[Exception], kind: type[Exception]) -> None:
    def body(ranks: Ranks) -> None:
        def make() -> bytes:
            if ranks.rank == 1:
                raise error("too much")
            return b"fine"

        ranks.exchange("words", make)

    zero, one, two = together(3, body)
    assert isinstance(one, error)
    for other in (zero, two):
        assert type(other) is kind
        assert str(other) == f"rank 1: {error.__name__}: too much"


def test_a_rank_that_is_gone_is_noticed_at_once_with_what_was_waited_for() -> None:
    def body(ranks: Ranks) -> None:
        ranks.exchange("the beginning", lambda: b"")
        if ranks.rank == 0:
            ranks.exchange("the gradient of update 3", lambda: b"")

    started = time.monotonic()
    zero, one = together(2, body, deadline_s=120)
    assert one is None
    assert isinstance(zero, RankLost)
    assert "for the gradient of update 3 from rank 1" in str(zero)
    assert time.monotonic() - started < 60


def test_what_no_restart_mends_ends_a_rank_inside_a_pass_as_a_crash_does() -> None:
    """Returned as the reason to end, it would leave the others waiting until their deadline."""

    def body(ranks: Ranks) -> None:
        if ranks.rank == 0:
            inside = pytest.raises(FailedInside, match="the gradient of update 3: Rigged: too wide")
            with inside, ranks.meeting("the gradient of update 3"):
                raise Rigged("too wide")
            with pytest.raises(Rigged), ranks.meeting("the velocity", alike=(Rigged,)):
                raise Rigged("diverged, on every rank")

    assert together(2, body) == [None, None]


def test_a_lost_rank_is_named_where_torch_itself_meets_the_others_and_other_errors_are_not() -> None:
    def body(ranks: Ranks) -> None:
        ranks.exchange("the beginning", lambda: b"")
        if ranks.rank == 0:
            with pytest.raises(RuntimeError, match=r"^no room"), ranks.meeting("the gradient of update 3"):
                raise RuntimeError("no room")
            with ranks.meeting("the gradient of update 3"):
                ranks._data.allreduce([torch.ones(3)]).wait()

    zero, one = together(2, body, deadline_s=120)
    assert one is None
    assert isinstance(zero, RankLost)
    assert "for the gradient of update 3 from rank 1" in str(zero)


@pytest.mark.parametrize("what", ["exchange", "sum", "order", "next_order"])
def test_every_wait_has_a_deadline_and_a_name(what: str) -> None:
    over = threading.Event()

    def body(ranks: Ranks) -> None:
        ranks.exchange("the beginning", lambda: b"")
        waits = {
            "exchange": lambda: ranks.exchange("the words", lambda: b""),
            "sum": lambda: ranks.sum("the numbers", [torch.ones(3)]),
            "order": lambda: ranks.order_all(Order(do="compare", step=7)),
            "next_order": lambda: ranks.next_order(beside_s=0.2),
        }
        if ranks.rank == (1 if what == "next_order" else 0):
            try:
                waits[what]()
            finally:
                over.set()
        else:
            assert over.wait(60)  # there, and silent

    (error,) = [result for result in together(2, body, deadline_s=1) if result is not None]
    named = {
        "exchange": "the words from rank 1",
        "sum": "the numbers from rank 1",
        "order": r"its taking the order to compare \(step 7\) from rank 1",
        "next_order": "the next order from rank 0",
    }
    assert isinstance(error, RankLost)
    with pytest.raises(RankLost, match=rf"waited \d.*learner.rank_deadline_s\), for {named[what]}"):
        raise error
