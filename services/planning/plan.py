"""A split of N GPUs between rollout workers, learner ranks and rewards: the fastest that fits.

Promises
- More GPUs never make a plan slower: what does not help is left idle, and told.
- What cannot be is refused with the sum that shows it.
- Of splits that are within `TIE` of the fastest the one with the fewest GPUs is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from services.config import Config
from services.config_file import ConfigError
from services.planning.cost import Memory, Work, adapters, memory_of, micro_batch, work_of
from services.planning.published import PassCost, Published, pass_cost
from services.planning.rewards import RewardCost, reward_costs
from services.planning.step import Requests, Shape, Split, Step, Times, predict, share_of
from services.planning.traffic import Machine, Traffic, traffic

TIE = 1.01
REWARD_LOAD = 0.8
"""Replicas are so many that they are busy for this share of an update at most: requests then wait little."""

PROXY_SHARE = 0.8
"""Of an update: a proxy that is busy for longer is told of."""


@dataclass(frozen=True)
class Costs:
    """Of an update of a recipe, whatever runs it."""

    config: Config
    model: Published
    counted: PassCost
    work: Work
    memory: Memory
    rewards: tuple[RewardCost, ...]
    machine: Machine

    @property
    def shape(self) -> Shape:
        return Shape(self.config.learner.groups_per_step, self.config.queue.max_staleness)

    @property
    def rollout_gpu_s(self) -> float:
        return self.work.sampling / self.machine.rate

    @property
    def learner_gpu_s(self) -> float:
        return self.work.training / self.machine.rate

    def reward_s(self, *, on_gpu: bool) -> float:
        """Of replicas on a GPU, or of those on CPUs."""
        return sum(
            self.shape.groups * self.group_score_s(one) for one in self.rewards if one.on_gpu == on_gpu
        )

    def group_score_s(self, reward: RewardCost) -> float:
        return (reward.seconds or 0.0) * reward.share * self.config.rollout.group_size

    def reading_leads(self, split: Split) -> bool:
        """Whether the learner reads groups for longer than it trains on them: rank 0 does so for all."""
        share = share_of(self.shape, split.ranks) / self.shape.groups
        return self.traffic(split).take_s > share * self.learner_gpu_s

    def traffic(self, split: Split) -> Traffic:
        workers, ranks = (1, 1) if split.colocated else (split.workers, split.ranks)
        seen = {one.name: one.share for one in self.rewards}
        return traffic(
            self.config, self.model, self.counted, self.machine, seen, workers=workers, ranks=ranks
        )

    def times(self, split: Split) -> Times:
        moved = self.traffic(split)
        return Times(
            sample=self.rollout_gpu_s / self.shape.groups,
            scores={one.name: self.group_score_s(one) for one in self.rewards},
            requests={
                one.name: Requests(self.config.rollout.group_size, one.images_per_request)
                for one in self.config.rewards
                if one.images_per_request
            },
            update=self.learner_gpu_s / self.shape.groups,
            install=moved.install_s,
            take=moved.take_s,
            gather=moved.gather_s,
            publish=moved.publish_s,
            queue=moved.queue_s,
            proxy=moved.proxy_s,
        )


@dataclass(frozen=True)
class Plan:
    """A split, and what it should give."""

    gpus: int
    """That there are."""
    split: Split
    step: Step
    costs: Costs
    notes: tuple[str, ...]

    @property
    def idle(self) -> int:
        return self.gpus - self.split.gpus


def costs_of(
    config: Config,
    model: Published,
    machine: Machine,
    reward_seconds: Mapping[str, float] | None = None,
    counted: PassCost | None = None,
) -> Costs:
    """What an update costs.

    Args:
        counted: what one sample costs, where that is known already: counting a large model takes a while.

    Raises:
        ConfigError: passes of its objective are not counted, or nothing is sampled.
    """
    if config.offline:
        raise ConfigError("prompts.source 'recorded': nothing is sampled, so there is no split to plan")
    if counted is None:
        counted = pass_cost(model, config.model.height, config.model.width, adapters(config))
    return Costs(
        config=config,
        model=model,
        counted=counted,
        work=work_of(config, counted),
        memory=memory_of(config, model, counted),
        rewards=reward_costs(config, machine.rate, reward_seconds or {}),
        machine=machine,
    )


def make_plan(costs: Costs, gpus: int) -> Plan:
    """The fastest split of so many GPUs.

    Raises:
        ConfigError: there is none; the text says what needs how much.
    """
    best: dict[int, tuple[Split, Step]] = {}
    fastest = math.inf
    for candidate in _splits(costs, gpus):
        if _at_least(costs, candidate) > fastest * TIE:
            continue
        split, step = _with_replicas(costs, candidate)
        fastest = min(fastest, step.seconds)
        if split.gpus not in best or step.seconds < best[split.gpus][1].seconds:
            best[split.gpus] = split, step
    if not best:
        raise ConfigError(_refusal(costs, gpus))
    fewest = min(count for count, (_, step) in best.items() if step.seconds <= fastest * TIE)
    split, step = best[fewest]
    return Plan(gpus, split, step, costs, tuple(_notes(costs, split, step, gpus)))


def _splits(costs: Costs, gpus: int) -> Iterator[Split]:
    shape, memory = costs.shape, costs.memory
    if _colocated_gib(costs) <= costs.machine.gpu_gib:
        yield Split(workers=1, ranks=1, colocated=True)
    if memory.sampler > costs.machine.gpu_gib or memory.rewards > costs.machine.gpu_gib:
        return
    shared = _worker_gib(costs) <= costs.machine.gpu_gib
    shares: set[int] = set()
    for ranks in range(1, min(gpus - 1, shape.groups) + 1):
        share = share_of(shape, ranks)
        if share in shares or not _holds(costs, ranks):
            continue
        # More ranks whose largest share is as large only wait.
        shares.add(share)
        for workers in range(min(gpus - ranks, shape.window), 0, -1):
            # A reward that fits beside the sampler shares its GPU: then nothing is left over of either.
            left = gpus - ranks - workers
            most = min(left, workers if any(one.on_gpu for one in costs.rewards) else 1)
            for reward_gpus in (0,) if shared else range(1, most + 1):
                yield Split(workers=workers, ranks=ranks, reward_gpus=reward_gpus)


def _holds(costs: Costs, ranks: int) -> bool:
    """Whether a GPU holds one of so many ranks; services/config refuses shards of a single one."""
    if ranks == 1 and costs.config.learner.sharding != "none":
        return False
    return _rank_gib(costs, ranks) <= costs.machine.gpu_gib


def _at_least(costs: Costs, split: Split) -> float:
    """Seconds that an update takes with such a split, whatever else it waits for."""
    learner = share_of(costs.shape, split.ranks) * costs.learner_gpu_s / costs.shape.groups
    return max(costs.rollout_gpu_s / split.workers, learner)


def _with_replicas(costs: Costs, split: Split) -> tuple[Split, Step]:
    """As many replicas as keep up, and no more than one for each request of a worker: it has one group scored
    at a time."""
    times, shape = costs.times(split), costs.shape
    fixed = {one.name: split.reward_gpus for one in costs.rewards if one.on_gpu and split.reward_gpus}
    on_worker = [one for one in costs.rewards if one.on_gpu and not split.reward_gpus]
    shared = sum(map(costs.group_score_s, on_worker))
    if fixed:
        # The networks of one GPU take turns.
        together = sum(times.scores[name] for name in fixed)
        times = replace(times, scores={**times.scores, **dict.fromkeys(fixed, together)})
    silent = replace(times, scores={name: times.scores[name] for name in fixed})
    seconds = predict(shape, silent, replace(split, replicas=fixed), shared).seconds
    most = {
        name: min(split.workers, shape.groups) * times.requests.get(name, Requests()).count
        for name in times.scores
    }
    wanted = {
        name: max(1, min(most[name], math.ceil(shape.groups * each / (REWARD_LOAD * seconds))))
        for name, each in times.scores.items()
    }
    split = replace(split, replicas={**wanted, **fixed})
    step = predict(shape, times, split, shared)
    while step.seconds > seconds * TIE and any(
        wanted[name] < most[name] for name in wanted if name not in fixed
    ):
        # Workers that ask at the same time are waited for.
        wanted = {name: min(most[name], 2 * count) for name, count in wanted.items()}
        split = replace(split, replicas={**wanted, **fixed})
        step = predict(shape, times, split, shared)
    return split, step


def _rank_gib(costs: Costs, ranks: int) -> float:
    divided = ranks if costs.config.learner.sharding == "fsdp" else 1
    return costs.memory.rank / divided + costs.memory.activations


def _worker_gib(costs: Costs) -> float:
    evaluator = costs.memory.sampler if costs.config.eval.num_gpus else 0.0
    return costs.memory.sampler + evaluator + costs.memory.rewards


def _colocated_gib(costs: Costs) -> float:
    if costs.config.learner.sharding == "fsdp":
        return math.inf
    return _worker_gib(costs) + _rank_gib(costs, 1)


def _refusal(costs: Costs, gpus: int) -> str:
    memory, room = costs.memory, costs.machine.gpu_gib
    rank = memory.rank + memory.activations
    has = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
    head = (
        f"{has} of {room:g} GiB cannot hold this recipe: a rollout worker takes {memory.sampler:.1f} GiB, "
        f"rewards on a GPU {memory.rewards:.1f}, "
        f"a learner rank {memory.rank:.1f} + {memory.activations:.1f} of activations = {rank:.1f}"
    )
    if max(memory.sampler, memory.rewards) > room:
        return f"{head}; sampling and scoring are not divided over GPUs"
    sharded = costs.config.learner.sharding == "fsdp"
    if not sharded and rank > room:
        return f"{head}. {_smaller(costs)}"
    wanted = (count for count in range(1, costs.shape.groups + 1) if _holds(costs, count))
    if (ranks := next(wanted, None)) is None:
        return f"{head}; as many ranks as groups ({costs.shape.groups}) do not hold it. {_smaller(costs)}"
    apart = 0 if _worker_gib(costs) <= room else 1
    together = (
        ""
        if sharded
        else f"; on one GPU all of it takes {_colocated_gib(costs):.1f} GiB (less with a smaller "
        "learner.micro_batch)"
    )
    on_gpu = any(one.on_gpu for one in costs.rewards)
    rewards = f" + 1 for {'rewards' if on_gpu else 'the evaluator'}" if apart else ""
    counted = "1 learner rank" if ranks == 1 else f"{ranks} learner ranks"
    return f"{head}{together}. It needs 1 worker + {counted}{rewards} = {1 + ranks + apart} GPUs"


def _smaller(costs: Costs) -> str:
    """What would make a rank fit."""
    memory, room, samples = costs.memory, costs.machine.gpu_gib, micro_batch(costs.config)
    if memory.rank < room and costs.config.learner.sharding == "none":
        fits = int((room - memory.rank) / memory.activations * samples)
        if fits:
            return f"Set learner.micro_batch={fits}: it is {samples}"
        return "Set learner.gradient_checkpointing"
    return "Divide a rank's share: learner.sharding=fsdp, more ranks, and a smaller learner.micro_batch"


def _notes(costs: Costs, split: Split, step: Step, gpus: int) -> Iterator[str]:
    config, shape, moved = costs.config, costs.shape, costs.traffic(split)
    if idle := gpus - split.gpus:
        yield (
            f"{idle} GPUs would make it less than {TIE - 1:.0%} faster: an update has {shape.groups} groups, "
            f"at most {shape.window} are under way at once, and ranks share whole groups; raise "
            "learner.groups_per_step or take fewer GPUs"
        )
    if moved.proxy_s > PROXY_SHARE * step.seconds:
        yield (
            f"images take {moved.proxy_s:.1f} s through Serve's one proxy, at "
            f"{costs.machine.proxy_bytes_s / 1e6:.0f} MB/s: serve rewards elsewhere, behind several "
            "(rewards[].url), or measure yours and give --proxy-mb-s"
        )
    if costs.reading_leads(split):
        yield (
            f"{moved.take_s:.1f} s of the learner's are rank 0 reading groups, at "
            f"{costs.machine.queue_bytes_s / 1e6:.0f} MB/s: measure yours, and give --queue-mb-s"
        )
    for reward in costs.rewards:
        if reward.seconds is None:
            yield f"reward {reward.name}: seconds an image are {reward.source} {reward.name}=SECONDS"
    room, window = config.queue.max_bytes, shape.window * moved.group
    if window > room:
        yield (
            f"a window of {shape.window} groups is {window / 1e9:.2f} GB: "
            f"set queue.max_bytes={window * 5 // 4}"
        )
    if shape.window > config.queue.max_groups:
        yield f"a window has {shape.window} groups: set queue.max_groups={shape.window * 5 // 4}"
    if config.model.dtype == "float32":
        yield "model.dtype is float32, and the assumed rate is that of bfloat16: measure, or give --tflops"
    if config.learner.gradient_checkpointing or config.learner.activation_offload:
        yield "activations are not in the GiB of a rank: they are computed again, or kept in host memory"
    if config.learner.sharding == "fsdp":
        yield "with fsdp each pass gathers weights between the ranks, whose time is not in it"
