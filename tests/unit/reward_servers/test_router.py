"""The counting of the router; what it does in Serve: tests/integration/test_reward_router.py."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.request_router import RequestRouter

from reward_servers.router import FewestRequests


class Counting(FewestRequests):
    """Without what Serve makes of a router: replicas, their queues, an event loop."""

    def __init__(self, *replicas: str) -> None:
        self._use_replica_queue_len_cache = False
        self.initialize_state()
        self.listed = [SimpleNamespace(replica_id=name) for name in replicas]

    def goes_to(self) -> str:
        ranked = asyncio.run(self.choose_replicas(self.listed))
        assert sorted(one.replica_id for (one,) in ranked) == sorted(one.replica_id for one in self.listed)
        first: Any = ranked[0][0].replica_id
        self.on_send_request(first)
        return str(first)


def test_each_in_turn_and_then_who_has_the_fewest() -> None:
    router = Counting("a", "b", "c")
    assert sorted(router.goes_to() for _ in range(3)) == ["a", "b", "c"]
    router.on_request_completed("b", "1")
    assert router.goes_to() == "b"


@pytest.mark.parametrize(("for_s", "chosen"), [(60.0, ["a", "b", "b"]), (-1.0, ["b", "b", "b"])])
def test_what_is_chosen_counts_before_it_is_sent_but_not_for_ever(for_s: float, chosen: list[str]) -> None:
    router = Counting("a", "b")
    router.on_send_request("a")
    router.UNDERWAY_S = for_s
    assert (
        sorted(asyncio.run(router.choose_replicas(router.listed))[0][0].replica_id for _ in range(3))
        == chosen
    )


def test_a_replica_that_is_listed_again_gets_no_more_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while Serve updates it: what it had meanwhile ends when it is not counted."""
    monkeypatch.setattr(RequestRouter, "update_replicas", lambda self, replicas: None)
    router = Counting("a", "b")
    for _ in range(3):
        router.on_send_request("b")
    a, b = router.listed
    router.update_replicas([a])
    for number in range(3):
        router.on_request_completed("b", str(number))
    router.update_replicas([a, b])
    assert sorted(router.goes_to() for _ in range(6)) == ["a"] * 3 + ["b"] * 3


def test_nobody_to_choose_from() -> None:
    assert asyncio.run(Counting().choose_replicas([])) == []
