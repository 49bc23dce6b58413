"""Where the parts of a run go, on a real Ray cluster of several nodes with simulated GPUs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ray_nodes import RAY, cluster_on_this_machine
from small_runs import SMALL

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 2
H100 = "accelerator_type:H100"
OVERRIDES = (
    *SMALL,
    f"learner.max_steps={STEPS}",
    *("learner.groups_per_step=2", "eval.every_steps=0", "eval.final_prompts=2"),
    *("learner.num_gpus=1", "learner.accelerator_type=H100", "learner.ranks=2", "learner.placement=spread"),
    "learner.compare_every=1",
    *("rollout.workers=2", "rollout.num_gpus=1", "rollout.resources={samplers: 0.5}"),
    *("eval.num_gpus=0.5", "eval.resources={trainers: 0.5}"),
    "rewards=[{name: jpeg, app: jpeg, num_cpus: 0.1, num_gpus: 0.5, resources: {scorers: 1}}]",
    "cluster.wait_s=180",
)


class Placed:
    """What the job has told (placed_run.py)."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.told = told

    def nodes_of(self, actor: str) -> list[str]:
        return [
            one["node_id"]
            for one in self.told["actors"]
            if actor in (one["class_name"].partition(":")[0], one["name"])
        ]

    def node_of(self, actor: str) -> str:
        (found,) = self.nodes_of(actor)
        return found

    def has(self, actor: str) -> list[dict[str, float]]:
        """What each node has that such an actor was on."""
        return [self.told["nodes"][node] for node in self.nodes_of(actor)]


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Placed:
    """A head without GPUs and a node that samples; one that samples and trains, and one that trains, join
    when they are waited for."""
    with cluster_on_this_machine("--num-cpus=2", "--num-gpus=0") as cluster:
        cluster.add_node(cpus=2, gpus=5, resources={"samplers": 2})
        script = str(Path(__file__).with_name("placed_run.py"))
        directory = f"run.directory={tmp_path_factory.mktemp('runs')}"
        # No --working-dir: the nodes are on one machine and would unpack it over each other.
        job = subprocess.Popen(
            [RAY, "job", "submit", "--", "python", script, directory, *OVERRIDES],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=cluster.environment | {"RAY_ADDRESS": cluster.dashboard},
        )
        assert job.stdout is not None
        lines: list[str] = []
        told: dict[str, Any] = {}
        for line in job.stdout:
            lines.append(line)
            if line.startswith("{"):
                told |= (found := json.loads(line))
                if "waiting" in found:
                    both = {"samplers": 2, "scorers": 1, H100: 1}
                    cluster.add_node(cpus=2, gpus=3, resources=both)
                    cluster.add_node(cpus=2, gpus=2, resources={"trainers": 2, H100: 1})
        assert job.wait(timeout=60) == 0, "".join(lines)
        return Placed(told)


def test_a_run_that_the_cluster_cannot_hold_is_refused_with_arithmetic(placed: Placed) -> None:
    text, (found,) = placed.told["refused"], placed.told["doctor"]
    arithmetic = "needs 12 GPUs: 2 learner + 9 rollout + 0.5 eval + 0.5 reward jpeg; the cluster has 5"
    assert arithmetic in text
    assert arithmetic in found
    assert "set cluster.wait_s" in text


def test_a_run_waits_for_a_node_that_is_still_to_come(placed: Placed) -> None:
    assert "needs 2 GPUs on nodes with H100: 2 learner; those have 0" in placed.told["waiting"]
    assert "needs 0.5 trainers: 0.5 eval; the cluster has 0" in placed.told["waiting"]
    assert "of 180 s" in placed.told["waiting"]
    assert placed.told["steps"] == STEPS


def test_what_is_waited_for_is_a_demand_that_goes_with_the_wait(placed: Placed) -> None:
    asked = [bundle for group in placed.told["demand"] for bundle in group]
    assert any({H100, "GPU"} <= bundle.keys() for bundle in asked)
    assert any({"trainers", "GPU"} <= bundle.keys() for bundle in asked)
    assert placed.told["demand_later"] == []


def test_each_part_is_on_a_node_that_has_what_it_asks_for(placed: Placed) -> None:
    run = placed.told["run"]
    parts = (
        *(("RayTrainWorker", H100), (f"{run}/evaluator", "trainers"), ("ServeReplica", "scorers")),
        *((f"{run}/rollout-0", "samplers"), (f"{run}/rollout-1", "samplers")),
    )
    for actor, resource in parts:
        assert placed.has(actor)
        assert all(resource in node for node in placed.has(actor)), actor


def test_ranks_of_the_learner_train_together_from_several_nodes(placed: Placed) -> None:
    """They compare their weights behind each update."""
    first, second = placed.nodes_of("RayTrainWorker")
    assert first != second
    assert placed.told["steps"] == STEPS


def test_workers_are_spread_or_packed(placed: Placed) -> None:
    run = placed.told["run"]
    assert placed.node_of(f"{run}/rollout-0") != placed.node_of(f"{run}/rollout-1")
    first, second = placed.told["packed"]
    assert first == second
    assert placed.told["later"] == "DEFAULT"
