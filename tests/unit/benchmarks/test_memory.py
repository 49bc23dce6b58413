"""The memory of an update in pieces does not depend on the group size."""

from __future__ import annotations

import pytest

from benchmarks.memory import FLAT_TARGET, SIZES, _peak


@pytest.mark.slow
def test_a_group_in_pieces_takes_the_memory_of_a_piece() -> None:
    small, large = (_peak(size, 1) for size in (SIZES[0], SIZES[2]))
    assert large <= small * (1 + FLAT_TARGET)
    assert _peak(SIZES[2], SIZES[2]) > 2 * small
