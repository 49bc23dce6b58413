"""Which rewards a group may do without, and that an evaluation may do without none."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from reward_servers.client import RewardError, RewardInvalid, RewardUnavailable, Scored
from rollout_workers.scoring import GroupScores, RewardServers
from services.config import RewardConfig
from services.context import RewardPlace
from services.messages import Prompt

IMAGES = np.zeros((2, 4, 4, 3), dtype=np.uint8)
ALL = {"trained", "optional", "heldout"}


class Client:
    """In place of a RewardClient: scores 0.5, or is down."""

    def __init__(self, name: str, down: set[str]) -> None:
        self._name, self._down = name, down

    def score(
        self,
        images: NDArray[np.uint8],
        prompts: Sequence[str],
        metadata: Sequence[Any],
        *,
        spent_s: float,
    ) -> Scored:
        assert spent_s == 0, "one request is a group's, with all of its deadline"
        if self._name in self._down:
            raise RewardUnavailable(self._name, "http://127.0.0.1:1", "no scores within 1 s")
        return Scored((0.5,) * len(images), ({},) * len(images), "model", "1")

    def close(self) -> None:
        pass


@pytest.fixture
def down() -> set[str]:
    """Names of the rewards that are down."""
    return set()


Asked = tuple[str, bool, type[object]]
"""Reward, whether its seconds are some, kind of its error."""


@pytest.fixture
def asked() -> list[Asked]:
    """What was told of each request."""
    return []


@pytest.fixture
def servers(down: set[str], asked: list[Asked], monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardServers]:
    monkeypatch.setattr("services.context.RewardClient", lambda name, *args, **kw: Client(name, down))
    url = "http://127.0.0.1:1"
    rewards = [
        RewardConfig(name="trained", url=url),
        RewardConfig(name="optional", url=url, required=False),
        RewardConfig(name="heldout", url=url, heldout=True, every=8),
    ]
    made = RewardServers(
        rewards,
        dict.fromkeys(ALL, RewardPlace(url=url)),
        lambda reward, seconds, error: asked.append((reward, seconds >= 0, type(error))),
    )
    yield made
    made.close()


def scored(servers: RewardServers, ordinal: int | None) -> set[str]:
    return set(servers.score(IMAGES, [Prompt(text="a"), Prompt(text="b")], ordinal=ordinal).rewards)


def test_held_out_rewards_are_asked_for_now_and_then_and_in_every_evaluation(servers: RewardServers) -> None:
    assert scored(servers, 8) == scored(servers, None) == ALL
    assert scored(servers, 9) == {"trained", "optional"}


@pytest.mark.parametrize("name", ["optional", "heldout"])
def test_a_group_does_without_what_an_evaluation_needs(
    servers: RewardServers, down: set[str], name: str
) -> None:
    down.add(name)
    assert scored(servers, 8) == ALL - {name}
    with pytest.raises(RewardError, match=f"'{name}'"):
        scored(servers, None)


def test_a_group_needs_the_required_rewards(servers: RewardServers, down: set[str]) -> None:
    down.add("trained")
    with pytest.raises(RewardError, match="'trained'"):
        scored(servers, 8)


def test_every_request_is_told_of_when_it_has_ended(
    servers: RewardServers, down: set[str], asked: list[Asked]
) -> None:
    down.add("optional")
    scored(servers, 9)
    nothing = type(None)
    assert sorted(asked, key=str) == [("optional", True, RewardUnavailable), ("trained", True, nothing)]


class Divided:
    """In place of a RewardClient: scores an image by its first pixel, as one version after another."""

    url = "http://127.0.0.1:1"

    def __init__(self, versions: Sequence[str], down: int | None = None) -> None:
        self._versions, self._down = iter(versions), down
        self._ready = threading.Barrier(3, timeout=60)
        self.requests: list[tuple[int, ...]] = []
        self.spent: list[float] = []
        self.ended = 0

    def score(
        self,
        images: NDArray[np.uint8],
        prompts: Sequence[str],
        metadata: Sequence[Any],
        *,
        spent_s: float,
    ) -> Scored:
        self.spent.append(spent_s)
        firsts = tuple(int(image[0, 0, 0]) for image in images)
        assert list(prompts) == [f"prompt {first}" for first in firsts]
        assert list(metadata) == [{"number": first} for first in firsts]
        self.requests.append(firsts)
        # Broken unless all requests of a group are there at once.
        self._ready.wait()
        version = next(self._versions)
        try:
            if self._down in firsts:
                raise RewardUnavailable("ocr", self.url, "no scores within 1 s")
            time.sleep(0.05)
            return Scored(tuple(float(first) for first in firsts), ({},) * len(firsts), "model", version)
        finally:
            self.ended += 1

    def close(self) -> None:
        pass


def divided(client: Divided, monkeypatch: pytest.MonkeyPatch) -> GroupScores:
    """Scores of 8 images, 3 a request."""
    monkeypatch.setattr("services.context.RewardClient", lambda *args, **kw: client)
    reward = RewardConfig(name="ocr", url=client.url, images_per_request=3)
    servers = RewardServers([reward], {"ocr": RewardPlace(url=client.url)})
    images = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None, None, None], (8, 4, 4, 3))
    prompts = [Prompt(text=f"prompt {number}", metadata={"number": number}) for number in range(8)]
    try:
        return servers.score(images, prompts, ordinal=0)
    finally:
        servers.close()


def test_a_group_is_scored_in_requests_at_once_and_comes_back_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = Divided(["1"] * 3)
    found = divided(client, monkeypatch)
    assert found.rewards == {"ocr": tuple(map(float, range(8)))}
    assert len(found.details["ocr"]) == 8
    assert sorted(client.requests) == [(0, 1, 2), (3, 4, 5), (6, 7)]


def test_a_group_that_two_versions_have_scored_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Divided(["1", "2", "2", "2", "2", "2"])
    assert divided(client, monkeypatch).rewards == {"ocr": tuple(map(float, range(8)))}
    assert len(client.requests) == 6
    # The second round has what the first one left of the deadline.
    assert min(client.spent[3:]) >= 0.05
    with pytest.raises(RewardInvalid, match="answered by model 1 and model 2, 3 times"):
        divided(Divided(["1", "2", "2"] * 3), monkeypatch)


def test_a_request_that_fails_fails_the_group_when_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first: the others are not waited for by asking for their scores.
    client = Divided(["1"] * 3, down=0)
    with pytest.raises(RewardUnavailable, match="'ocr'"):
        divided(client, monkeypatch)
    assert client.ended == 3
