"""Commands reach the server in few writes, and in the very bytes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from services.queue_connection import WRITE_BYTES, whole_writes


@given(st.lists(st.integers(0, 3 * WRITE_BYTES), max_size=12))
def test_the_bytes_stay_the_same_in_their_order(sizes: list[int]) -> None:
    pieces = [bytes([number]) * size for number, size in enumerate(sizes)]
    assert b"".join(whole_writes(pieces)) == b"".join(pieces)


@given(st.lists(st.integers(0, WRITE_BYTES), max_size=40))
def test_two_writes_that_follow_each_other_would_not_fit_into_one(sizes: list[int]) -> None:
    writes = [len(write) for write in whole_writes([bytes(size) for size in sizes])]
    assert all(first + second > WRITE_BYTES for first, second in itertools.pairwise(writes))


def test_a_large_value_is_not_copied() -> None:
    large = bytes(WRITE_BYTES + 1)
    head, body, tail = whole_writes([b"$3\r\n", large, b"\r\n"])
    assert (head, tail) == (b"$3\r\n", b"\r\n")
    assert body is large
