"""A turn on a shared card: what is done in it, and in which order."""

from __future__ import annotations

from typing import Any

import pytest

from services.card import OwnCard, SharedCard
from services.heartbeat import Pulse


class Lock:
    """A turn of services/queue_turn.py that is always free."""

    def __init__(self, done: list[str]) -> None:
        self.done, self.held = done, False

    def take(self, deadline_s: float) -> None:
        self.done.append("taken")
        self.held = True

    def give(self) -> None:
        self.done.append("given")
        self.held = False

    def renew(self) -> None:
        self.done.append("renewed")


class State:
    def __init__(self, done: list[str], *, stuck: bool = False, full: bool = False) -> None:
        self.done, self.stuck, self.full = done, stuck, full

    def come_back(self) -> None:
        self.done.append("on the card")
        if self.full:
            raise MemoryError

    def leave(self) -> None:
        self.done.append("off the card")
        if self.stuck:
            raise MemoryError


def shared(done: list[str]) -> SharedCard:
    lock: Any = Lock(done)
    return SharedCard(lock, Pulse("rollout-0", lambda beat: done.append(beat.state)), 60.0)


def test_state_is_on_the_card_in_the_turn_only() -> None:
    done: list[str] = []
    card = shared(done)
    with card.turn():
        done.append("loads")
        card.state = State(done)
    with card.turn():
        card.take()
        done.append("computes")
    card.give()
    first, second = ["taken", "loads"], ["taken", "on the card", "computes"]
    end = ["off the card", "given"]
    assert done == [*first, *end, *second, *end]


def test_a_card_that_has_no_room_is_left_to_the_others() -> None:
    done: list[str] = []
    card = shared(done)
    card.state = State(done, full=True)
    with pytest.raises(MemoryError), card.turn():
        done.append("computes")
    assert done == ["taken", "on the card", "given"]


def test_a_beat_renews_the_turn() -> None:
    done: list[str] = []
    card = shared(done)
    pulse = card._pulse
    with pulse:
        card.take()
    assert done[-2:] == ["moving onto the card", "renewed"]


def test_a_turn_ends_also_where_the_state_cannot_leave() -> None:
    done: list[str] = []
    card = shared(done)
    card.state = State(done, stuck=True)
    with pytest.raises(MemoryError), card.turn():
        pass
    assert done[-1] == "given"


def test_a_card_of_ones_own_is_waited_for_by_nobody() -> None:
    card = OwnCard()
    card.state = State([], stuck=True)
    with card.turn():
        card.take()
    card.give()
