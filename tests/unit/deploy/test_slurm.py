"""deploy/slurm/train.sbatch, run by bash, with a Slurm, Ray and Valkey that write down how they are used.

What this cannot show is a Slurm that does what it is asked: the script has not been run by one.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from services.config_file import PROJECT_ROOT, load_config

SCRIPT = PROJECT_ROOT / "deploy" / "slurm" / "train.sbatch"
RECIPE = "deploy/slurm/quickstart.yaml"
ADDRESS = "10.1.2.3"
NODES = [{"is_head_node": True, "state": "ALIVE", "resources_total": {"CPU": 4.0, "dgpo_driver": 1.0}}]
# One program for all of them; what is started in the background lasts until it is told to end.
PROGRAM = """#!/usr/bin/env bash
name=$(basename "$0")
line=$(printf '%q ' "$name" "$@")
printf '%s\\n' "$line" >> "$FAKE/calls"  # in one write: several of these run at once
last() { trap 'echo "$name" >> "$FAKE/ended"; exit 0' TERM; while :; do sleep 0.1; done; }
case "$name $*" in
  "scontrol show hostnames"*) printf 'first\\nsecond\\nthird\\n' ;;
  srun*hostname*) echo "10.1.2.3 fe80::1" ;;
  "srun"*"ray start"*) last ;;
  valkey-server*) last ;;
  "ray list nodes"*) cat "$FAKE/nodes" ;;
  "ray job submit"*)
    env | grep -E '^(RAY_AUTH|DGPO)' | sort > "$FAKE/environment"
    touch "$FAKE/submitted"
    while [ -f "$FAKE/lasts" ] && [ ! -f "$FAKE/stopped" ]; do sleep 0.1; done
    exit "$(cat "$FAKE/code")"
    ;;
  "ray job stop"*) touch "$FAKE/stopped" ;;
  "serve deploy"*) cp "${@: -1}" "$FAKE/served.yaml" ;;
esac
"""


class Slurm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("scontrol", "srun", "valkey-server", "ray", "serve"):
            (folder / name).write_text(PROGRAM)
            (folder / name).chmod(0o755)
        (folder / "nodes").write_text(json.dumps(NODES))
        (folder / "code").write_text("0")

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "DGPO_", "SLURM_"))}
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env={
                **kept,
                "PATH": f"{self.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "FAKE": str(self.folder),
                "DGPO_RUNS": str(self.folder / "runs"),
                "SLURM_JOB_ID": "17",
                "SLURM_SUBMIT_DIR": str(PROJECT_ROOT),
                "SLURM_JOB_NUM_NODES": "3",
                "SLURM_JOB_NODELIST": "node[1-3]",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def signalled(self, number: signal.Signals) -> int:
        """A run that lasts, and is sent this."""
        (self.folder / "lasts").touch()
        process = self.start(RECIPE)
        give_up = time.monotonic() + 100
        while not (self.folder / "submitted").exists():
            assert process.poll() is None and time.monotonic() < give_up, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=120)
        return process.returncode

    @property
    def calls(self) -> list[list[str]]:
        return [shlex.split(line) for line in (self.folder / "calls").read_text().splitlines()]

    def call(self, *begins: str) -> list[str]:
        (found,) = [call for call in self.calls if call[: len(begins)] == list(begins)]
        return found


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def started(slurm: Slurm) -> dict[str, list[str]]:
    """`head` and `workers` -> the whole call of srun."""
    calls = [call for call in slurm.calls if call[0] == "srun" and "start" in call]
    return {"head" if "--head" in call else "workers": call for call in calls}


def test_everything_is_started_on_its_node_and_ends_with_the_job(slurm: Slurm) -> None:
    code, _, err = slurm.run(RECIPE, "learner.max_steps=2")
    assert code == 0, err
    head, workers = started(slurm)["head"], started(slurm)["workers"]
    assert {"--nodelist=first", "--port=6379", f"--node-ip-address={ADDRESS}"} <= set(head)
    assert {"--dashboard-host=127.0.0.1", '--resources={"dgpo_driver": 1}'} <= set(head)
    assert {"--nodes=2", "--ntasks=2", "--exclude=first", f"--address={ADDRESS}:6379"} <= set(workers)
    server = slurm.call("valkey-server")
    assert server[1] == "deploy/redis/redis.conf" and server[server.index("--bind") + 1] == ADDRESS
    assert server[server.index("--dir") + 1] == str(slurm.folder / "runs" / "quickstart-17" / ".queue")
    assert sorted((slurm.folder / "ended").read_text().split()) == ["srun", "srun", "valkey-server"]
    assert not Path(server[server.index("--aclfile") + 1]).exists()


def test_the_run_is_submitted_with_the_addresses_of_this_job(slurm: Slurm) -> None:
    code, _, err = slurm.run(RECIPE, "learner.max_steps=2", SLURM_RESTART_COUNT="2")
    assert code == 0, err
    job = slurm.call("ray", "job", "submit")
    assert job[job.index("--submission-id") + 1] == "quickstart-17-attempt-3"
    entry = job[job.index("--") + 1 :]
    assert entry[:5] == [*("bash", "deploy/attempt.sh", str(slurm.folder / "runs"), "quickstart-17", RECIPE)]
    config = load_config(PROJECT_ROOT / RECIPE, entry[5:])
    assert config.queue.url == f"redis://run@{ADDRESS}:6380/0"
    served = ServeDeploySchema.model_validate(yaml.safe_load((slurm.folder / "served.yaml").read_text()))
    assert served.http_options.host == ADDRESS
    base = f"http://{ADDRESS}:{served.http_options.port}"
    offered = {base + app.route_prefix for app in served.applications}
    assert {reward.url for reward in config.rewards} == offered
    assert config.learner.max_steps == 2
    environment = dict(line.split("=", 1) for line in (slurm.folder / "environment").read_text().splitlines())
    names = {config.queue.password_env, *(reward.token_env for reward in config.rewards), "RAY_AUTH_TOKEN"}
    secrets = [environment[str(name)] for name in names]
    assert len(set(secrets)) == len(secrets) and all(len(secret) == 64 for secret in secrets)
    assert not any(secret in (slurm.folder / "calls").read_text() for secret in secrets)


def test_a_recipe_that_cannot_be_used_is_not_submitted(slurm: Slurm, tmp_path: Path) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_text("extends: quickstart\nlearner: {max_steps: -1}\n")
    code, _, err = slurm.run(str(recipe))
    assert code == 2 and "cannot be used" in err and "learner.max_steps" in err
    assert not [call for call in slurm.calls if call[:3] == ["ray", "job", "submit"]]
    assert sorted((slurm.folder / "ended").read_text().split()) == ["srun", "srun", "valkey-server"]


def test_the_exit_code_is_that_of_the_run(slurm: Slurm) -> None:
    (slurm.folder / "code").write_text("1")
    assert slurm.run(RECIPE)[0] == 1
    assert not [call for call in slurm.calls if call[:2] == ["scontrol", "requeue"]]


def test_before_its_time_is_up_it_stops_and_is_queued_again(slurm: Slurm) -> None:
    assert slurm.signalled(signal.SIGUSR1) == 0
    assert slurm.call("ray", "job", "stop")[3] == "quickstart-17-attempt-1"
    assert slurm.call("scontrol", "requeue") == ["scontrol", "requeue", "17"]
    order = [call[:3] for call in slurm.calls]
    assert order.index(["ray", "job", "stop"]) < order.index(["scontrol", "requeue", "17"])


def test_asked_to_end_it_stops_for_good(slurm: Slurm) -> None:
    (slurm.folder / "code").write_text("1")
    assert slurm.signalled(signal.SIGTERM) == 1
    assert slurm.call("ray", "job", "stop")
    assert not [call for call in slurm.calls if call[:2] == ["scontrol", "requeue"]]
    assert sorted((slurm.folder / "ended").read_text().split()) == ["srun", "srun", "valkey-server"]


def test_one_node_and_rewards_elsewhere(slurm: Slurm) -> None:
    code, _, err = slurm.run(RECIPE, SLURM_JOB_NUM_NODES="1", DGPO_SERVE_CONFIG="")
    assert code == 0, err
    assert set(started(slurm)) == {"head"}
    assert not [call for call in slurm.calls if call[0] == "serve"]


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        ((), {}, "usage"),
        ((RECIPE,), {"DGPO_RUNS": ""}, "DGPO_RUNS"),
        ((RECIPE,), {"SLURM_JOB_ID": ""}, "sbatch"),
        ((RECIPE,), {"SLURM_SUBMIT_DIR": "/"}, "root of a checkout"),
    ],
)
def test_wrong_usage(
    slurm: Slurm, arguments: tuple[str, ...], environment: dict[str, Any], told: str
) -> None:
    code, _, err = slurm.run(*arguments, **environment)
    assert code == 2 and told in err
    assert not (slurm.folder / "calls").exists()


def test_what_slurm_reads() -> None:
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.M))
    assert directives["signal"].startswith("B:USR1@"), "to this script, not to its steps"
    assert {"requeue", "exclusive"} <= set(directives)
    assert SCRIPT.read_text().splitlines()[1].startswith("#SBATCH"), "Slurm stops at the first command"
