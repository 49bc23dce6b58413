"""How long an update takes, from how long its parts take: plain arithmetic, checked by `dgpo bench plan`.

An update cannot be faster than any of these, and is predicted to be as long as the longest:
- rollout: what a worker has to sample of its groups, and the install of the new weights;
- learner: reading the groups, the share of the rank with the most groups, adding gradients up, publishing;
- rewards: what a replica of the slowest reward has to score; a worker has one group scored at a time;
- queue: the bytes and the groups that pass through its server;
- turnaround: an ordinal is issued at most `max_staleness` updates ahead of its own, so from its issue to the
  end of its update (a round of sampling, the last scores, the learner) there are `max_staleness` + 1 updates.
  With `max_staleness: 0` that is the sum of all parts: they take turns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shape:
    """Of an update."""

    groups: int
    staleness: int

    @property
    def window(self) -> int:
        """Groups that are sampled, scored or queued at most."""
        return (self.staleness + 1) * self.groups


@dataclass(frozen=True)
class Requests:
    """Those in which a reward is asked about a group, all at once.

    >>> requests = Requests(images=24, each=10)
    >>> requests.count, requests.whole, requests.last
    (3, 2, 4)
    """

    images: int = 1
    """Of the group."""
    each: int = 1
    """Images of a request; the last may have fewer."""

    @property
    def count(self) -> int:
        return math.ceil(self.images / self.each)

    @property
    def whole(self) -> int:
        """Requests that have as many."""
        return self.images // self.each

    @property
    def last(self) -> int:
        """Images of one beside them; 0: there is none."""
        return self.images % self.each

    @property
    def largest(self) -> float:
        """Share of the group's images in the one that takes longest."""
        return min(self.each, self.images) / self.images

    def rounds(self, groups: int, replicas: int) -> float:
        """How long so many groups take that are asked about at once, in a replica's time for one of them.

        Whole requests go first; the others go where there is time beside the last of those, and then behind.
        """
        full, more = divmod(groups * self.whole, replicas)
        images = (full + bool(more)) * self.each
        if self.last:
            beside = (replicas - more) * (self.each // self.last) if more else 0
            images += math.ceil(max(0, groups - beside) / replicas) * self.last
        return images / self.images


@dataclass(frozen=True)
class Times:
    """Seconds of the parts, each of one of them."""

    sample: float
    """A worker, a group."""
    scores: Mapping[str, float]
    """Reward -> a replica, a group."""
    update: float
    """A rank, a group."""
    install: float = 0.0
    """A worker, a version; while all others install it too."""
    take: float = 0.0
    """The learner's reading of an update's groups."""
    gather: float = 0.0
    """The ranks' adding up of gradients, an update."""
    publish: float = 0.0
    """A version."""
    queue: float = 0.0
    """The server of the queue, an update."""
    proxy: float = 0.0
    """The proxy before the rewards, an update."""
    requests: Mapping[str, Requests] = field(default_factory=dict)
    """Reward -> in which a group is scored; left out: one."""


@dataclass(frozen=True)
class Split:
    """Who there is."""

    workers: int
    ranks: int
    replicas: Mapping[str, int] = field(default_factory=dict)
    """Of rewards."""
    reward_gpus: int = 0
    """That hold rewards and nothing else; 0: rewards that need a GPU share those of the workers."""
    colocated: bool = False
    """One GPU, on which sampling, scoring and training take turns."""

    @property
    def gpus(self) -> int:
        return 1 if self.colocated else self.workers + self.ranks + self.reward_gpus


@dataclass(frozen=True)
class Step:
    """An update, in seconds."""

    seconds: float
    bottleneck: str
    parts: Mapping[str, float]
    """rollout, learner, rewards, proxy, queue and turnaround: each a bound."""


def predict(shape: Shape, times: Times, split: Split, shared: float = 0.0) -> Step:
    """The bounds of an update, and the longest.

    Args:
        shared: seconds a group that scoring takes of the GPU of the worker that it shares.
    """
    sample = times.sample + shared
    busy = min(split.workers, shape.window)
    each = shape.groups / busy
    learner = times.take + share_of(shape, split.ranks) * times.update + times.gather + times.publish
    # More workers than a round of the window ask for scores one after the other.
    asking = min(split.workers, shape.groups)
    asked = {name: times.requests.get(name, Requests()) for name in times.scores}
    waits = [
        seconds * asked[name].rounds(asking, split.replicas.get(name, 1))
        for name, seconds in times.scores.items()
    ]
    score, rounds = max(waits, default=0.0), math.ceil(shape.groups / asking)
    once = times.install + sample + (rounds - 1) * max(sample, score) + score + learner
    # All replicas busy; or each worker waiting for the largest request of each of its groups.
    rewards = [
        shape.groups * seconds * max(1 / split.replicas.get(name, 1), asked[name].largest / busy)
        for name, seconds in times.scores.items()
    ]
    parts = {
        # A worker that samples less than a group an update installs weights for each of its groups.
        "rollout": each * sample + min(1.0, each) * times.install,
        "learner": learner,
        "rewards": max(rewards, default=0.0),
        "proxy": times.proxy,
        "queue": times.queue,
        "turnaround": once / (shape.staleness + 1),
    }
    turns = [] if shape.staleness else ["rollout", "learner", "rewards"]
    if split.colocated and (both := parts["rollout"] + learner) >= parts["turnaround"]:
        parts["turnaround"], turns = both, ["rollout", "learner"]
    longest = max(parts, key=lambda name: parts[name])
    if longest == "turnaround" and turns:
        # Parts that take turns are all waited for: the longest is what to make shorter.
        longest = max(turns, key=lambda name: parts[name])
    return Step(seconds=max(parts.values()), bottleneck=longest, parts=parts)


def share_of(shape: Shape, ranks: int) -> int:
    """Groups of the rank with the most: groups are not split, and it is waited for."""
    return math.ceil(shape.groups / ranks)
