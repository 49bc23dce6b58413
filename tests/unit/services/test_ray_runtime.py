"""What a run reserves of Ray."""

from __future__ import annotations

import pytest
import ray

from services.config_file import ConfigError, load_config
from services.ray_runtime import (
    at_max_replicas,
    no_room_to_grow,
    ray_cluster,
    replicas_to_come,
    reserved,
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


@pytest.mark.parametrize(
    ("cpus", "says"),
    [(2.0, "reserves 2.5 CPUs, the cluster has 2 now"), (3.0, "2.5 + ocr 4 x 0.5 = 4.5 CPUs"), (4.5, "")],
)
def test_a_cluster_with_too_little_room_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cpus: float, says: str
) -> None:
    """Not refused: it may be one that grows."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus})
    with ray_cluster(load_config("quickstart", ["cluster.address=ray.example:6379", *GROWING])):
        pass
    if says:
        assert says in caplog.text
    else:
        assert not caplog.records


ELSEWHERE = [
    "queue.url=redis://queue.example:6379",
    "rewards=[{name: ocr, url: 'https://rewards.example/ocr'}]",
]


@pytest.mark.parametrize(
    ("nodes", "overrides", "refused"),
    [(1, [], ""), (2, ELSEWHERE, ""), (2, ELSEWHERE[:1], "reward ocr"), (2, ELSEWHERE[1:], "the queue")],
)
def test_nothing_listens_on_one_loopback_of_several_nodes(
    monkeypatch: pytest.MonkeyPatch, nodes: int, overrides: list[str], refused: str
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * nodes + [{"Alive": False}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0})
    cluster = ray_cluster(load_config("quickstart", ["cluster.address=ray.example:6379", *overrides]))
    if refused:
        with pytest.raises(ConfigError, match=f"2 nodes.*{refused}"), cluster:
            pass
    else:
        with cluster as own:
            assert not own


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that can never be placed would be waited for in silence."""
    ended: list[bool] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Whatever Ray the tests around this one have running.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: None)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    refused = load_config("quickstart", ["rollout.num_gpus=0.5", "learner.num_gpus=0.25"])
    with (
        pytest.raises(
            ConfigError, match=r"reserves 1\.25 GPUs in parts that take 2 whole ones, this machine has 1:"
        ),
        ray_cluster(refused),
    ):
        pytest.fail("a run started that could never be placed")
    assert ended == [True]
    with ray_cluster(load_config("quickstart", ["rollout.num_gpus=0.5"])) as own:
        assert own
