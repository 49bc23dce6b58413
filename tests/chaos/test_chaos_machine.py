"""The clock and the disk of the chaos bench, and what a clock that jumps does to leases and turns."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.chaos_machine import Clock, fill, mount_small_disk, unmount
from services.config import QueueConfig
from services.config_file import ConfigError
from services.embedded import EmbeddedValkey
from services.group_queue import GroupQueue, connect
from services.messages import PolicyVersion, WeightsAnnouncement

HOUR_S = 3600
DEADLINE_S = 30.0


class Site:
    """A queue of one step of two groups, by a clock that can jump."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock(folder)
        self.server = EmbeddedValkey(folder / "queue", server=self.clock.server).start()
        self.client = connect(self.server.url, self.server.password)
        self.queue = GroupQueue(self.client, "clock", QueueConfig(lease_s=60))

        def weights(version: PolicyVersion) -> WeightsAnnouncement:
            return WeightsAnnouncement(version=version, kind="policy", digest="0", tensors=1, bytes=4)

        self.queue.begin_epoch(weights, limit=2, window=2)

    def ahead_s(self) -> float:
        seconds, _ = self.client.time()
        return seconds - time.time()

    def jump(self, seconds: int) -> None:
        wanted = self.ahead_s() + seconds
        self.clock.jump(seconds)
        give_up = time.monotonic() + DEADLINE_S
        while abs(self.ahead_s() - wanted) > DEADLINE_S:
            assert time.monotonic() < give_up, f"{self.ahead_s():g} s ahead in place of {wanted:g}"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.server.stop()


def test_a_clock_that_goes_ahead_ends_leases(site: Site) -> None:
    first = site.queue.issue("w0")
    assert first is not None
    site.jump(HOUR_S)
    again = site.queue.issue("w1")
    assert again is not None and (again.ordinal, again.attempt) == (first.ordinal, 2)


def test_a_clock_that_goes_back_makes_no_lease_longer(site: Site) -> None:
    site.jump(HOUR_S)
    lease = site.queue.issue("w0")
    assert lease is not None
    site.jump(-HOUR_S)
    assert site.queue.issue("w1") is not None and site.queue.issue("w2") is None
    assert all(held.expires_in_s <= 60 for held in site.queue.status().leases)


def test_a_clock_that_goes_back_keeps_no_turn_for_the_dead(site: Site) -> None:
    site.jump(HOUR_S)
    held = [site.queue.issue("w0"), site.queue.issue("w0")]
    assert site.queue.issue("dead") is None and site.queue.issue("w1") is None
    site.queue.release("w0", 0)
    assert held[0] is not None and site.queue.status().called == ("dead",)
    site.jump(-HOUR_S)
    assert site.queue.issue("w1") is not None


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mount_small_disk(place)
    except ConfigError as error:
        pytest.skip(str(error))
    yield place
    unmount(place)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs")
def test_nothing_more_fits_on_a_disk_that_is_full(disk: Path) -> None:
    filler = fill(disk)
    with pytest.raises(OSError, match="No space left"):
        (disk / "more").write_bytes(b"1")
    filler.unlink()
    (disk / "more").write_bytes(b"1")
