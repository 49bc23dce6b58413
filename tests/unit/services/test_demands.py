"""What a run asks of Ray, how it adds up, and what can never fit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from services.config_file import ConfigError, load_config
from services.demands import (
    Demand,
    Node,
    at_max_replicas,
    demands,
    no_room_to_grow,
    replicas_to_come,
    reserved,
    shortfalls,
    sums,
    whole_gpus,
)


def test_every_part_that_reserves_cpus_is_counted() -> None:
    base = reserved(load_config("quickstart"), "num_cpus")
    for key, more in (
        ("learner.num_cpus=2.5", 2.0),
        ("learner.ranks=3", 1.0),
        ("rollout.num_cpus=1.25", 2.0),
        ("rewards.0.num_cpus=2.1", 2.0),
        ("eval.num_cpus=2", 2.0),
    ):
        assert reserved(load_config("quickstart", [key]), "num_cpus") == pytest.approx(base + more), key


@pytest.mark.parametrize(
    ("workers", "worker", "rank", "small", "whole"),
    [(2, 0.8, 1, 0.1, 4), (2, 0.8, 1, 0.3, 5), (3, 0.6, 0, 0, 3), (1, 0.4, 0.4, 0.1, 1), (2, 0, 2, 0, 4)],
)
def test_a_part_of_a_gpu_is_not_spread_over_two(
    workers: int, worker: float, rank: float, small: float, whole: int
) -> None:
    """Two ranks, an evaluator and a reward beside the workers; of one worker, one rank."""
    config = load_config(
        "quickstart",
        [
            *(f"rollout.workers={workers}", f"rollout.num_gpus={worker}", f"learner.num_gpus={rank}"),
            *(f"learner.ranks={min(workers, 2)}", f"eval.num_gpus={small}", f"rewards.0.num_gpus={small}"),
        ],
    )
    assert whole_gpus(config) == whole


GROWING = [
    "rewards=[{name: ocr, app: ocr, num_cpus: 0.5, replicas: 2, max_replicas: 6}, "
    "{name: judge, app: vlm_judge, num_cpus: 0, max_replicas: 9}, "
    "{name: far, url: 'https://rewards.example/far'}]",
    "rollout.num_cpus=0",
    "learner.num_cpus=1.5",
    "eval.num_cpus=0",
]
"""2.5 CPUs from the start, 2 more with load."""


def test_replicas_that_load_brings_are_not_reserved_from_the_start() -> None:
    config = load_config("quickstart", GROWING)
    assert reserved(config, "num_cpus") == 2.5
    assert at_max_replicas(config, "num_cpus") == (4.5, "2.5 + ocr 4 x 0.5 = 4.5 CPUs")
    assert at_max_replicas(config, "num_gpus") == (0.0, "")
    assert replicas_to_come(config) == 12


@pytest.mark.parametrize(("cpus", "fits"), [(4.5, True), (4.4, False)])
def test_what_does_not_fit_at_max_replicas_is_added_up(cpus: float, fits: bool) -> None:
    lines = no_room_to_grow(load_config("quickstart", GROWING), {"num_cpus": cpus, "num_gpus": 0.0})
    told = ["at max_replicas the run reserves 2.5 + ocr 4 x 0.5 = 4.5 CPUs, and there are 4.4"]
    assert lines == ([] if fits else told)


def gpus(*counts: float, **more: float) -> list[Node]:
    return [Node({"GPU": count, "CPU": 8.0, **more}) for count in counts]


LEARNER = Demand("learner", 4, {"GPU": 1.0, "CPU": 1.0})
WORKERS = Demand("rollout", 4, {"GPU": 1.0})
SCORER = Demand("reward pickscore", 1, {"GPU": 1.0})


@pytest.mark.parametrize(
    ("asked", "nodes", "says"),
    [
        (
            [LEARNER, WORKERS, SCORER],
            gpus(4, 4),
            ["needs 9 GPUs: 4 learner + 4 rollout + 1 reward pickscore; the cluster has 8"],
        ),
        ([LEARNER, WORKERS], gpus(4, 4), []),
        ([Demand("rollout", 3, {"CPU": 4.0})], gpus(1), ["needs 12 CPUs: 12 rollout; the cluster has 8"]),
        (
            [Demand("learner", 1, {"GPU": 2.0})],
            gpus(1, 1),
            ["needs 1 x (2 GPUs), each on one node: learner; of 2 nodes there is room for 0"],
        ),
        (
            [Demand("rollout", 3, {"GPU": 0.6})],
            gpus(2),
            ["needs 1.8 GPUs (in parts that take 3 whole ones): 1.8 rollout; the cluster has 2"],
        ),
        (
            [Demand("learner", 1, {"GPU": 2.0}), Demand("rollout", 1, {"GPU": 2.0})],
            gpus(3, 1),
            [
                "needs 2 pieces of at least 2 GPUs, each on one node: 1 learner + 1 rollout; "
                "the nodes have room for 1"
            ],
        ),
        # Custom resources: a sum of their own, and the CPUs of the nodes that have them.
        (
            [Demand("learner", 2, {"CPU": 1.0, "pool": 1.0})],
            [Node({"CPU": 8.0}), Node({"CPU": 8.0, "pool": 1.0})],
            ["needs 2 pool: 2 learner; the cluster has 1"],
        ),
        (
            [Demand("learner", 2, {"CPU": 3.0, "pool": 1.0}), Demand("rollout", 2, {"CPU": 3.0})],
            [Node({"CPU": 12.0}), Node({"CPU": 4.0, "pool": 8.0})],
            ["needs 6 CPUs on nodes with pool: 6 learner; those have 4"],
        ),
        # Accelerators: GPUs there are enough of, but not of that type.
        (
            [Demand("learner", 2, {"GPU": 1.0, "accelerator_type:H100": 0.001}), WORKERS],
            [*gpus(8), *gpus(1, **{"accelerator_type:H100": 1.0})],
            ["needs 2 GPUs on nodes with H100: 2 learner; those have 1"],
        ),
        (
            [Demand("eval", 1, {"accelerator_type:H100": 0.001})],
            gpus(1),
            ["needs 1 x (H100), each on one node: eval; of 1 node there is room for 0"],
        ),
        ([Demand("learner", 1, {"GPU": 1.0})], [], ["needs 1 GPU: 1 learner; the cluster has 0"]),
    ],
)
def test_what_can_never_fit_is_told_with_its_arithmetic(
    asked: Sequence[Demand], nodes: Sequence[Node], says: list[str]
) -> None:
    assert [one.text for one in shortfalls(asked, nodes)] == says


def test_several_sums_are_short_at_once() -> None:
    found = shortfalls([LEARNER, SCORER], [Node({"GPU": 2.0, "CPU": 3.0})])
    assert [one.missing for one in found] == ["3 more GPUs", "1 more CPU"]


def test_tenths_add_up_to_one() -> None:
    asked = [Demand("rollout", 1, {"GPU": 0.8}), Demand("eval", 2, {"GPU": 0.1})]
    assert shortfalls(asked, gpus(1)) == []


def test_every_part_is_listed_with_all_that_it_reserves() -> None:
    config = load_config(
        "quickstart",
        [
            *("learner.ranks=2", "learner.resources={trainers: 1}", "learner.accelerator_type=H100"),
            *("rollout.workers=3", "rollout.num_cpus=0", "rollout.resources={samplers: 0.5}"),
            *("eval.accelerator_type=L4", "rewards.0.resources={scorers: 2}", "rewards.0.replicas=2"),
        ],
    )
    rank = {"CPU": config.learner.num_cpus, "trainers": 1.0, "accelerator_type:H100": 0.001}
    found = {demand.part: (demand.count, demand.each) for demand in demands(config)}
    assert found == {
        "learner": (2, rank),
        "rollout": (3, {"samplers": 0.5}),
        "eval": (1, {"accelerator_type:L4": 0.001}),
        "reward ocr": (2, {"CPU": config.rewards[0].num_cpus, "scorers": 2.0}),
        "reward tesseract": (1, {"CPU": config.rewards[1].num_cpus}),
    }
    text = sums(demands(config))
    assert "1.5 samplers: 1.5 rollout" in text
    assert "2 trainers: 2 learner" in text
    without = [demand.part for demand in demands(config, evaluating=False)]
    assert without == ["learner", "rollout", "reward ocr", "reward tesseract"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("learner.resources={GPU: 1}", "learner.resources: GPU is no custom resource: set num_gpus"),
        ("rollout.resources={CPU: 1}", "rollout.resources: CPU is no custom resource: set num_cpus"),
        ("eval.resources={memory: 1}", "memory is no custom resource: no part of a run reserves it"),
        ("rewards.0.resources={pool: -1}", "pool -1 must be more than 0"),
        ("learner.resources={pool: 0}", "pool 0 must be more than 0"),
        ("rollout.resources={'': 1}", "needs a name"),
        ("learner.resources={'accelerator_type:H100': 1}", "set accelerator_type to H100"),
        ("rollout.accelerator_type=''", "rollout.accelerator_type"),
        ("rollout.placement=strict", "rollout.placement"),
        ("learner.placement=spread", "learner.placement spread with learner.ranks 1"),
    ],
)
def test_what_is_no_place_is_refused(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", [override])
    assert says in str(caught.value)
