"""Refused at once, or waited for: what a run says of a cluster that is too small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray

from services import cluster_room
from services.cluster_room import require_room
from services.config_file import ConfigError, load_config
from services.demands import Demand, demands

FOUR = [Demand("learner", 4, {"GPU": 1.0})]


@pytest.fixture
def grows(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A cluster of these GPUs, at each look one node more; the autoscaler's part is played by nobody."""

    @contextmanager
    def asked(demands: Any) -> Iterator[None]:
        yield

    def make(*gpus: float, cpus: float = 64.0) -> None:
        looks = [
            [{"Alive": True, "Resources": {"GPU": n, "CPU": cpus}} for n in gpus[: i + 1]]
            for i in range(len(gpus))
        ]
        monkeypatch.setattr(ray, "nodes", lambda: looks.pop(0) if len(looks) > 1 else looks[0])
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus, "GPU": sum(gpus)})
        monkeypatch.setattr(cluster_room, "_autoscaler_asked", asked)
        monkeypatch.setattr(cluster_room, "LOOK_EVERY_S", 0.001)

    return make


def test_a_cluster_that_is_too_small_is_refused_at_once(grows: Callable[..., None]) -> None:
    grows(1, 2)
    told: list[str] = []
    with pytest.raises(ConfigError) as caught:
        require_room(load_config("quickstart"), FOUR, own_ray=False, tell=told.append)
    assert str(caught.value) == (
        "there is no room for the run: it needs 4 GPUs: 4 learner; the cluster has 1. Either lower workers, "
        "ranks or replicas, or what each reserves, or add nodes, or, for a cluster that grows by itself, set "
        "cluster.wait_s"
    )
    assert told == []


def test_a_cluster_that_grows_is_waited_for_with_progress(grows: Callable[..., None]) -> None:
    grows(1, 2, 1)
    told: list[str] = []
    require_room(load_config("quickstart", ["cluster.wait_s=600"]), FOUR, own_ray=False, tell=told.append)
    assert told == [
        "waiting for 1 more GPU: needs 4 GPUs: 4 learner; the cluster has 3; 0 of 600 s",
    ]


def test_a_wait_that_was_in_vain_says_what_is_missing(grows: Callable[..., None]) -> None:
    grows(1)
    config = load_config("quickstart", ["cluster.wait_s=0.01"])
    with pytest.raises(ConfigError, match=r"4 learner; the cluster has 1 after 0\.01 s \(cluster\.wait_s\)"):
        require_room(config, FOUR, own_ray=False)


def test_whoever_watches_may_end_the_wait(grows: Callable[..., None]) -> None:
    grows(1)

    def stop(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        require_room(load_config("quickstart", ["cluster.wait_s=600"]), FOUR, own_ray=False, tell=stop)


def test_a_machine_of_its_own_is_not_waited_for(grows: Callable[..., None]) -> None:
    """Fractions: a worker that can never be placed would be waited for in silence."""
    grows(1)
    config = load_config(
        "quickstart", ["rollout.num_gpus=0.5", "learner.num_gpus=0.25", "cluster.wait_s=600"]
    )
    with pytest.raises(ConfigError) as caught:
        require_room(config, demands(config), own_ray=True)
    assert (
        "needs 1.25 GPUs (in parts that take 2 whole ones): 0.25 learner + 1 rollout; this machine has 1"
        in str(caught.value)
    )
    assert "join a cluster (cluster.address)" in str(caught.value)
    halves = load_config("quickstart", ["rollout.num_gpus=0.5"])
    require_room(halves, demands(halves), own_ray=True)


@pytest.mark.parametrize(("cpus", "warned"), [(4.0, "2.5 + ocr 4 x 0.5 = 4.5 CPUs"), (4.5, "")])
def test_replicas_to_come_are_warned_of_and_not_refused(
    grows: Callable[..., None], caplog: pytest.LogCaptureFixture, cpus: float, warned: str
) -> None:
    grows(0, cpus=cpus)
    config = load_config(
        "quickstart",
        [
            "rewards=[{name: ocr, app: ocr, num_cpus: 0.5, replicas: 2, max_replicas: 6}]",
            *("rollout.num_cpus=0", "learner.num_cpus=1.5", "eval.num_cpus=0"),
        ],
    )
    require_room(config, demands(config), own_ray=False)
    assert (warned in caplog.text) if warned else not caplog.records
