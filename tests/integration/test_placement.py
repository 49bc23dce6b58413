"""Where the parts of a run go, on a real Ray cluster of several nodes with simulated GPUs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ray_nodes import RAY, cluster_on_this_machine
from small_runs import SMALL

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

STEPS = 2
OVERRIDES = (
    *SMALL,
    f"learner.max_steps={STEPS}",
    *("learner.groups_per_step=2", "eval.every_steps=0", "eval.final_prompts=2"),
    *("learner.num_gpus=1", "learner.accelerator_type=H100"),
    *("rollout.workers=2", "rollout.num_gpus=1", "rollout.resources={samplers: 0.5}"),
    *("eval.num_gpus=0.5", "eval.resources={trainers: 0.5}"),
    "rewards=[{name: jpeg, app: jpeg, num_cpus: 0.1, num_gpus: 0.5, resources: {scorers: 1}}]",
    "cluster.wait_s=180",
)


class Placed:
    """What the job has told (placed_run.py)."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.told = told

    def node_of(self, actor: str) -> str:
        (found,) = (
            one["node_id"]
            for one in self.told["actors"]
            if actor in (one["class_name"].partition(":")[0], one["name"])
        )
        return str(found)

    def has(self, actor: str) -> dict[str, float]:
        """What the node has that the actor was on."""
        found: dict[str, float] = self.told["nodes"][self.node_of(actor)]
        return found


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Placed:
    """A head without GPUs, two nodes that sample, and one that trains, which joins when it is waited for."""
    with cluster_on_this_machine("--num-cpus=2", "--num-gpus=0") as cluster:
        cluster.add_node(cpus=2, gpus=2, resources={"samplers": 2})
        cluster.add_node(cpus=2, gpus=3, resources={"samplers": 2, "scorers": 1})
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
                    cluster.add_node(cpus=2, gpus=2, resources={"trainers": 2, "accelerator_type:H100": 1})
        assert job.wait(timeout=60) == 0, "".join(lines)
        return Placed(told)


def test_a_run_that_the_cluster_cannot_hold_is_refused_with_arithmetic(placed: Placed) -> None:
    text, (found,) = placed.told["refused"], placed.told["doctor"]
    arithmetic = "needs 11 GPUs: 1 learner + 9 rollout + 0.5 eval + 0.5 reward jpeg; the cluster has 5"
    assert arithmetic in text
    assert arithmetic in found
    assert "set cluster.wait_s" in text


def test_a_run_waits_for_a_node_that_is_still_to_come(placed: Placed) -> None:
    assert "needs 1 GPU on nodes with H100: 1 learner; those have 0" in placed.told["waiting"]
    assert "needs 0.5 trainers: 0.5 eval; the cluster has 0" in placed.told["waiting"]
    assert "of 180 s" in placed.told["waiting"]
    assert placed.told["steps"] == STEPS


def test_what_is_waited_for_is_a_demand_that_goes_with_the_wait(placed: Placed) -> None:
    asked = [bundle for group in placed.told["demand"] for bundle in group]
    assert any({"accelerator_type:H100", "GPU"} <= bundle.keys() for bundle in asked)
    assert any({"trainers", "GPU"} <= bundle.keys() for bundle in asked)
    assert placed.told["demand_later"] == []


def test_each_part_is_on_a_node_that_has_what_it_asks_for(placed: Placed) -> None:
    run = placed.told["run"]
    assert "accelerator_type:H100" in placed.has("RayTrainWorker")
    assert "trainers" in placed.has(f"{run}/evaluator")
    assert "samplers" in placed.has(f"{run}/rollout-0")
    assert "samplers" in placed.has(f"{run}/rollout-1")
    assert "scorers" in placed.has("ServeReplica")


def test_workers_are_spread_or_packed(placed: Placed) -> None:
    run = placed.told["run"]
    assert placed.node_of(f"{run}/rollout-0") != placed.node_of(f"{run}/rollout-1")
    first, second = placed.told["packed"]
    assert first == second
    assert placed.told["later"] == "DEFAULT"
