"""All rewards of one group at once: one request a reward server, or several, concurrently.

Promises
- Every required reward is there, for every sample, or `RewardError` is raised: nothing is made up.
- An optional or held-out reward that fails is left out of the group whole, and the failure is reported.
- An evaluation (no ordinal) gets every reward, or `RewardError`: a reward that is there for some prompts only
  would be paired with the wrong ones.
- All scores that a reward gives a group are of one version of its scorer, however many requests they took;
  these have one `deadline_s` together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from reward_servers.client import RewardError, RewardInvalid, Scored
from services.config import RewardConfig
from services.context import RewardPlace
from services.messages import Prompt

logger = logging.getLogger(__name__)

MOST_AT_ONCE: Final = 64
"""Requests to one reward, where a group is scored in several."""
TRIES: Final = 3
"""Of a group whose requests were answered by two versions, as while a server is updated."""


@dataclass(frozen=True)
class GroupScores:
    """Scores of one batch of images by reward name, in the order of the images."""

    rewards: dict[str, tuple[float, ...]]
    details: dict[str, tuple[dict[str, Any], ...]] = field(default_factory=dict)


class Scorer(Protocol):
    """Scores images; RewardServers for real, a timed wait in the overlap benchmark."""

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[Prompt], *, ordinal: int | None = None
    ) -> GroupScores: ...


@dataclass(frozen=True)
class Batch:
    """What a reward is asked about: images (N, H, W, 3) uint8, and the prompt and its metadata of each."""

    images: NDArray[np.uint8]
    texts: Sequence[str]
    metadata: Sequence[dict[str, Any]]

    def parts(self, size: int | None) -> list[Batch]:
        """Of so many images at most, in order; None: one of all."""
        firsts = range(0, len(self.images), size or len(self.images))
        places = [slice(first, first + size) if size else slice(None) for first in firsts]
        return [Batch(self.images[one], self.texts[one], self.metadata[one]) for one in places]


Asked = Callable[[str, float, Exception | None], None]


def _unheard(reward: str, seconds: float, error: Exception | None) -> None: ...


class RewardServers:
    """The reward servers of a run.

    Args:
        rewards: the configured rewards.
        places: reward name -> where its server is, and its token.
        asked: told of each request when it has ended: reward, seconds, and why it failed or None.
    """

    def __init__(
        self, rewards: Sequence[RewardConfig], places: Mapping[str, RewardPlace], asked: Asked = _unheard
    ) -> None:
        self._rewards = tuple(rewards)
        self._asked = asked
        self._clients = {
            reward.name: places[reward.name].client(reward.name, reward.deadline_s, app=reward.app)
            for reward in rewards
        }
        self._threads = ThreadPoolExecutor(max_workers=len(self._rewards), thread_name_prefix="reward")
        # Of their own: who waits for them in a thread of the others takes none of theirs, nor another reward.
        self._requests = {
            reward.name: ThreadPoolExecutor(MOST_AT_ONCE, thread_name_prefix=f"request {reward.name}")
            for reward in rewards
            if reward.images_per_request
        }

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[Prompt], *, ordinal: int | None = None
    ) -> GroupScores:
        """Scores of every reward that is due.

        Args:
            images: (N, H, W, 3) uint8.
            prompts: one an image, with its metadata.
            ordinal: of the group; decides which held-out rewards are due. None, an evaluation: all are, and
                all are required.

        Raises:
            RewardError: a required reward could not be had before its deadline.
        """
        due = [r for r in self._rewards if ordinal is None or ordinal % r.every == 0]
        batch = Batch(images, [one.text for one in prompts], [one.metadata for one in prompts])
        pending = {reward.name: self._threads.submit(self._whole, reward, batch) for reward in due}
        scored: dict[str, Scored] = {}
        failure: RewardError | None = None
        for reward in due:
            try:
                scored[reward.name] = pending[reward.name].result()
            except RewardError as error:
                # Every request is awaited, so that none still runs when the group is given up.
                if ordinal is None or (reward.required and not reward.heldout):
                    failure = failure or error
                else:
                    logger.warning("optional reward %s left out: %s", reward.name, error)
        if failure is not None:
            raise failure
        return GroupScores(
            rewards={name: tuple(s.scores) for name, s in scored.items()},
            details={name: tuple(s.details) for name, s in scored.items()},
        )

    def _whole(self, reward: RewardConfig, batch: Batch) -> Scored:
        """Of all images, in requests of `images_per_request`."""
        parts = batch.parts(reward.images_per_request)
        if len(parts) == 1:
            return self._ask(reward.name, batch)
        begun, requests = time.monotonic(), self._requests[reward.name]
        for _ in range(TRIES):
            asked = [requests.submit(self._ask, reward.name, part, begun) for part in parts]
            # Also after a failure: none still runs when the group is given up.
            wait(asked)
            found = [one.result() for one in asked]
            versions = sorted({f"{one.model} {one.version}" for one in found})
            if len(versions) == 1:
                return Scored(
                    scores=tuple(score for one in found for score in one.scores),
                    details=tuple(detail for one in found for detail in one.details),
                    model=found[0].model,
                    version=found[0].version,
                )
            logger.info("reward %s: one group was scored by %s: asked again", reward.name, versions)
        raise RewardInvalid(
            *(reward.name, self._clients[reward.name].url),
            f"the requests of one group were answered by {' and '.join(versions)}, {TRIES} times",
        )

    def _ask(self, reward: str, batch: Batch, since: float | None = None) -> Scored:
        """One request.

        Args:
            since: the group's deadline is reckoned from then; None: from now.
        """
        begun, failed = time.monotonic(), None
        spent_s = 0.0 if since is None else begun - since
        try:
            client = self._clients[reward]
            return client.score(batch.images, batch.texts, batch.metadata, spent_s=spent_s)
        except RewardError as error:
            failed = error
            raise
        finally:
            self._asked(reward, time.monotonic() - begun, failed)

    def close(self) -> None:
        for threads in (self._threads, *self._requests.values()):
            threads.shutdown(wait=False, cancel_futures=True)
        for client in self._clients.values():
            client.close()
