"""What a run asks of Ray from its start, part by part, and how it adds up.

Promises
- `demands` lists every part that reserves something, with what one piece of it needs on one node.
- `shortfalls` refuses only what can never fit these nodes, each line with its arithmetic; what it lets pass
  may still have to wait until others on the cluster have ended.

Pure arithmetic: nothing here asks a cluster (services/cluster_room.py does).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from services.config import Config, RewardConfig
from services.config.placement import ACCELERATOR, needs_of

Resource = Literal["num_cpus", "num_gpus"]
"""The setting that reserves it."""
RAY_NAMES: dict[Resource, str] = {"num_cpus": "CPU", "num_gpus": "GPU"}
UNITS: dict[Resource, str] = {"num_cpus": "CPUs", "num_gpus": "GPUs"}
GROWTH_REMEDY = (
    "lower max_replicas of rewards, or give the run more room: Serve starts what fits, and a worker or "
    "learner that restarts may find its place taken"
)
GRAIN = 10_000
"""Ray counts in ten-thousandths: 0.8 + 0.1 + 0.1 is one."""


@dataclass(frozen=True)
class Demand:
    """Pieces of one part, all alike.

    >>> Demand("rollout", 4, {"GPU": 1.0}).of("GPU")
    4.0
    """

    part: str
    """learner, rollout, eval, or `reward NAME`."""
    count: int
    each: Mapping[str, float]
    """Ray's name of a resource -> what a piece needs of it, on one node."""

    def of(self, resource: str) -> float:
        """What all pieces need of a resource."""
        return self.count * self.each.get(resource, 0.0)


@dataclass(frozen=True)
class Node:
    """A node of a cluster, with all that it has, free or not."""

    has: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Shortfall:
    """Why a run can never be held."""

    text: str
    """The arithmetic."""
    missing: str
    """What would have to come, in a few words."""


def demands(config: Config, *, evaluating: bool = True) -> list[Demand]:
    """Of a training run; controllers and a feeder reserve nothing.

    Args:
        evaluating: whether it has an evaluator, which needs the rewards even where groups are recorded.
    """
    learner = Demand("learner", config.learner.ranks, needs_of(config.learner))
    sampling = [] if config.offline else [sampling_demand(config)]
    evaluator = [Demand("eval", 1, needs_of(config.eval))] if evaluating else []
    rewards = reward_demands(config) if evaluating or not config.offline else []
    return _asking([learner, *sampling, *evaluator, *rewards])


def sampling_demand(config: Config) -> Demand:
    """Of the rollout workers, or of the workers of a suite, which reserve the same."""
    return Demand("rollout", config.rollout.workers, needs_of(config.rollout))


def reward_demands(config: Config) -> list[Demand]:
    """Of the rewards that a run serves itself."""
    return _asking([Demand(f"reward {one.name}", one.replicas, needs_of(one)) for one in _served(config)])


def _asking(found: Sequence[Demand]) -> list[Demand]:
    return [demand for demand in found if demand.each]


def reserved(config: Config, resource: Resource) -> float:
    """Ray CPUs or GPUs that the parts of a run reserve together from its start."""
    return sum(demand.of(RAY_NAMES[resource]) for demand in demands(config))


def whole_gpus(config: Config) -> int:
    """GPUs that a run takes from its start: a fraction of one is never spread over two."""
    return _whole_gpus(demands(config))


def _whole_gpus(asked: Sequence[Demand]) -> int:
    """Largest first, each where it fits; Ray, which places parts as they come, may need more if they are of
    many sizes."""
    pieces = [round(demand.each.get("GPU", 0.0) * GRAIN) for demand in asked for _ in range(demand.count)]
    room: list[int] = []
    for piece in sorted(pieces, reverse=True):
        place = next((place for place, left in enumerate(room) if piece <= left), None)
        if place is not None:
            room[place] -= piece
        elif piece:
            room += [0] * (piece // GRAIN) + ([GRAIN - piece % GRAIN] if piece % GRAIN else [])
    return len(room)


def replicas_to_come(config: Config) -> int:
    """Replicas that load may bring beyond those a run starts with."""
    return sum((reward.max_replicas or reward.replicas) - reward.replicas for reward in _served(config))


def at_max_replicas(config: Config, resource: Resource) -> tuple[float, str]:
    """What is reserved when load has brought every reward to its `max_replicas`, and how that adds up.

    Returns:
        The sum, and its text such as "3.5 + ocr 4 x 0.5 = 5.5 CPUs"; `reserved` and an empty text where no
        reward grows by that resource.
    """
    start, terms = reserved(config, resource), []
    total = start
    for reward in _served(config):
        more, each = (reward.max_replicas or reward.replicas) - reward.replicas, getattr(reward, resource)
        if more * each:
            total += more * each
            terms.append(f"{reward.name} {more} x {each:g}")
    return total, f"{' + '.join([f'{start:g}', *terms])} = {total:g} {UNITS[resource]}" if terms else ""


def no_room_to_grow(config: Config, there: Mapping[Resource, float]) -> list[str]:
    """A line for each resource that cannot hold every reward at its `max_replicas`.

    Args:
        there: what the cluster has; a resource that is not in it is not looked at.
    """
    lines = []
    for resource, has in there.items():
        total, sum_text = at_max_replicas(config, resource)
        if sum_text and total > has:
            lines.append(f"at max_replicas the run reserves {sum_text}, and there are {has:g}")
    return lines


def _served(config: Config) -> list[RewardConfig]:
    return [reward for reward in config.rewards if reward.app is not None]


def shortfalls(asked: Sequence[Demand], nodes: Sequence[Node], where: str = "the cluster") -> list[Shortfall]:
    """What of this can never be on these nodes at once; empty where nothing speaks against it.

    Sums first, then pieces against nodes: where a sum is short, the pieces would only repeat it.

    >>> asked = [Demand("learner", 4, {"GPU": 1}), Demand("rollout", 4, {"GPU": 1}),
    ...          Demand("reward pickscore", 1, {"GPU": 1})]
    >>> [one.text for one in shortfalls(asked, [Node({"GPU": 8})])]
    ['needs 9 GPUs: 4 learner + 4 rollout + 1 reward pickscore; the cluster has 8']
    """
    return (
        list(_short_sums(asked, nodes, where))
        or list(_short_places(asked, nodes))
        or list(_short_sizes(asked, nodes))
    )


def sums(asked: Sequence[Demand]) -> str:
    """All that is asked for, such as "9 GPUs: 4 learner + 5 rollout; 2 CPUs: 2 learner"."""
    return "; ".join(f"{_amount(total, name)}: {terms}" for name, total, terms in _sums(asked))


def _short_sums(asked: Sequence[Demand], nodes: Sequence[Node], where: str) -> Iterator[Shortfall]:
    told: set[str] = set()
    for marker in [None, *_markers(asked)]:
        among = [demand for demand in asked if marker is None or marker in demand.each]
        there = [node for node in nodes if marker is None or node.has.get(marker)]
        on, have = (
            ("", f"{where} has") if marker is None else (f" on nodes with {_bare(marker)}", "those have")
        )
        for name, total, terms in _sums(among):
            has = sum(node.has.get(name, 0.0) for node in there)
            whole = _whole_gpus(among) if name == "GPU" else 0
            missing = max(_over(total, has), _over(whole, has))
            if name in told or not missing:
                continue
            told.add(name)
            pieces = f" (in parts that take {whole} whole ones)" if whole > total else ""
            yield Shortfall(
                f"needs {_amount(total, name)}{pieces}{on}: {terms}; {have} {has:g}",
                f"{missing:g} more {_unit(missing, name)}{on}",
            )


def _sums(asked: Sequence[Demand]) -> Iterator[tuple[str, float, str]]:
    """Resource, total and terms, in Ray's order of importance; of accelerators there is no sum."""
    names = sorted(
        {name for demand in asked for name in demand.each}, key=lambda n: (n != "GPU", n != "CPU", n)
    )
    for name in names:
        terms = [f"{demand.of(name):g} {demand.part}" for demand in asked if demand.of(name)]
        if terms and not name.startswith(ACCELERATOR):
            yield name, round(sum(demand.of(name) for demand in asked), 4), " + ".join(terms)


def _short_places(asked: Sequence[Demand], nodes: Sequence[Node]) -> Iterator[Shortfall]:
    """Parts that have no room even alone, as whole pieces on single nodes."""
    for demand in asked:
        room = sum(min(_fit(need, node, name) for name, need in demand.each.items()) for node in nodes)
        if room < demand.count:
            amounts = _amounts(demand.each)
            yield Shortfall(
                f"needs {demand.count} x ({amounts}), each on one node: {demand.part}; "
                f"of {len(nodes)} node{'s' * (len(nodes) != 1)} there is room for {room}",
                f"room for {demand.count - room} x ({amounts}) on one node",
            )


def _short_sizes(asked: Sequence[Demand], nodes: Sequence[Node]) -> Iterator[Shortfall]:
    """Parts of one size or larger that have no room beside each other."""
    for name in sorted({name for demand in asked for name in demand.each}):
        for size in sorted({demand.each[name] for demand in asked if name in demand.each}, reverse=True):
            among = [demand for demand in asked if demand.each.get(name, 0.0) >= size]
            count, room = sum(one.count for one in among), sum(_fit(size, node, name) for node in nodes)
            if room < count:
                terms = " + ".join(f"{demand.count} {demand.part}" for demand in among)
                yield Shortfall(
                    f"needs {count} pieces of at least {_amount(size, name)}, each on one node: {terms}; "
                    f"the nodes have room for {room}",
                    f"room for {count - room} x {_amount(size, name)} on one node",
                )
                break


def _fit(need: float, node: Node, name: str) -> int:
    """How many pieces that need so much a node holds; of a GPU, none lies on two."""
    has, asked = round(node.has.get(name, 0.0) * GRAIN), max(1, round(need * GRAIN))
    if name == "GPU" and need < 1:
        return (has // GRAIN) * (GRAIN // asked)
    return has // asked


def _markers(asked: Sequence[Demand]) -> list[str]:
    """Resources that only some nodes have: accelerators and custom ones."""
    return sorted({name for demand in asked for name in demand.each} - set(RAY_NAMES.values()))


def _over(asked: float, has: float) -> float:
    return max(0, round(asked * GRAIN) - round(has * GRAIN)) / GRAIN


def _bare(name: str) -> str:
    return name.removeprefix(ACCELERATOR)


def _unit(amount: float, name: str) -> str:
    return f"{name}{'s' * (amount != 1)}" if name in RAY_NAMES.values() else _bare(name)


def _amount(amount: float, name: str) -> str:
    return f"{amount:g} {_unit(amount, name)}"


def _amounts(needs: Mapping[str, float]) -> str:
    """Of one piece."""
    counted = [_amount(need, name) for name, need in needs.items() if not name.startswith(ACCELERATOR)]
    return " + ".join([*counted, *(_bare(name) for name in needs if name.startswith(ACCELERATOR))])
