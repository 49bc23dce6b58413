"""deploy/submit.sh and attempt.sh: what they call, with a `ray` and a `python` that only write down how."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from services.config_file import PROJECT_ROOT

SUBMIT, ATTEMPT = PROJECT_ROOT / "deploy" / "submit.sh", PROJECT_ROOT / "deploy" / "attempt.sh"
BIN = Path(sys.executable).parent
# Writes its words down, one call a line and at once, whoever else writes; answers with the file named after
# its first two.
RECORDER = """#!/usr/bin/env bash
echo "$(printf '%q ' "$(basename "$0")" "$@")" >> "$FAKE/calls"
answer="$FAKE/$1-$2"
[ -f "$answer" ] && cat "$answer" >&"${ANSWER_ON:-1}"
[ ! -f "$answer.then" ] || mv "$answer.then" "$answer"
[ ! -f "$answer.fails" ] || { cat "$answer.fails" >&2; exit 1; }
"""


def node(head: bool, **resources: float) -> dict[str, object]:
    return {"is_head_node": head, "state": "ALIVE", "resources_total": {"CPU": 4.0, **resources}}


def details(submission_id: str, status: str) -> str:
    """As `ray job list` prints it, shortened."""
    return (
        f"JobDetails(type=<JobType.SUBMISSION: 'SUBMISSION'>, job_id=None, submission_id='{submission_id}', "
        f"driver_info=None, status=<JobStatus.{status}: '{status}'>, entrypoint='x', runtime_env={{}})"
    )


class Fake:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("ray", "python"):
            (folder / name).write_text(RECORDER)
            (folder / name).chmod(0o755)
        self.nodes(node(True, dgpo_driver=1.0))
        self.jobs()

    def nodes(self, *nodes: dict[str, object]) -> None:
        (self.folder / "list-nodes").write_text(json.dumps(nodes))

    def jobs(self, *jobs: str) -> None:
        (self.folder / "job-list").write_text(f"2026 INFO cli.py:600 -- [{', '.join(jobs)}]\n")

    def fails(self, call: str, text: str) -> None:
        (self.folder / f"{call}.fails").write_text(text)

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "DGPO_"))}
        return subprocess.run(
            ["bash", *map(str, command)],
            env={
                **kept,
                "PATH": f"{self.folder}:{BIN}:{os.environ['PATH']}",
                "FAKE": str(self.folder),
                "HOME": str(self.folder),
                "RAY_AUTH_TOKEN": "a-token",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def calls(self) -> list[list[str]]:
        return [shlex.split(line) for line in (self.folder / "calls").read_text().splitlines()]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def submitted(fake: Fake, *arguments: str, **environment: str) -> list[str]:
    done = fake.run(SUBMIT, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    call = fake.calls[-1]
    assert call[:3] == ["ray", "job", "submit"]
    printed = shlex.split(done.stdout.splitlines()[0])
    assert printed == ["RAY_AUTH_MODE=token", *call], "what is printed is what is run"
    assert "a-token" not in done.stdout + done.stderr + str(fake.calls), "the token is on no command line"
    return call


def option(call: Sequence[str], name: str) -> str:
    return call[list(call).index(name) + 1]


def entrypoint(call: list[str]) -> list[str]:
    return call[call.index("--") + 1 :]


def test_a_new_run(fake: Fake) -> None:
    words = ("learner.max_steps=2", "rewards.0.args={match: exact, note: 'a b'}")
    call = submitted(fake, "--runs", "/shared/runs", "--name", "first", "quickstart", *words)
    assert option(call, "--address") == "http://127.0.0.1:8265"
    assert option(call, "--submission-id") == "first-attempt-1"
    assert (PROJECT_ROOT / option(call, "--runtime-env")).is_file()
    assert json.loads(option(call, "--entrypoint-resources")) == {"dgpo_driver": 0.01}
    assert not any(word.startswith(("--entrypoint-num", "--no-wait")) for word in call)
    assert entrypoint(call) == [
        *("bash", "deploy/attempt.sh", "/shared/runs", "first", "quickstart"),
        *words,
    ]


def test_a_run_without_a_name_gets_one_of_its_recipe(fake: Fake) -> None:
    call = submitted(fake, "recipes/quickstart-guided.yaml", DGPO_RUNS="/r", RAY_ADDRESS="http://h:8265")
    assert option(call, "--address") == "http://h:8265"
    run = entrypoint(call)[3]
    assert run.startswith("quickstart-guided-2") and option(call, "--submission-id") == f"{run}-attempt-1"


def test_resume_is_the_next_attempt(fake: Fake) -> None:
    # 10 is more than 9; another run's attempts do not count.
    fake.jobs(
        *(details("mine-attempt-10", "FAILED"), details("mine-attempt-9", "RUNNING")),
        *(details("mine-b-attempt-40", "RUNNING"), details("raysubmit_x", "RUNNING")),
    )
    call = submitted(fake, "--runs", "/r", "--resume", "mine", "--no-wait", "learner.max_steps=9")
    assert option(call, "--submission-id") == "mine-attempt-11" and "--no-wait" in call
    assert entrypoint(call) == ["bash", "deploy/attempt.sh", "/r", "mine", "-", "learner.max_steps=9"]


def test_a_cluster_that_forgot_the_run_counts_from_one_and_can_be_told(fake: Fake) -> None:
    assert option(submitted(fake, "--runs", "/r", "--resume", "mine"), "--submission-id") == "mine-attempt-1"
    call = submitted(fake, "--runs", "/r", "--resume", "mine", "--attempt", "7")
    assert option(call, "--submission-id") == "mine-attempt-7"


def test_ray_may_answer_on_either_stream(fake: Fake) -> None:
    fake.jobs(details("mine-attempt-1", "STOPPED"))
    call = submitted(fake, "--runs", "/r", "--resume", "mine", ANSWER_ON="2")
    assert option(call, "--submission-id") == "mine-attempt-2"


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_two_attempts_at_once_are_refused(fake: Fake, status: str) -> None:
    fake.jobs(details("mine-attempt-1", status))
    done = fake.run(SUBMIT, "--runs", "/r", "--resume", "mine")
    assert done.returncode == 2
    assert "ray job stop mine-attempt-1" in done.stderr


def test_a_new_run_of_a_known_name_is_refused(fake: Fake) -> None:
    fake.jobs(details("mine-attempt-3", "SUCCEEDED"))
    done = fake.run(SUBMIT, "--runs", "/r", "--name", "mine", "quickstart")
    assert done.returncode == 2 and "--resume mine" in done.stderr


def test_print_submits_nothing(fake: Fake) -> None:
    done = fake.run(SUBMIT, "--print", "--runs", "/r", "--name", "mine", "quickstart")
    assert done.returncode == 0 and "ray job submit" in done.stdout
    assert sorted(call[1:3] for call in fake.calls) == [["job", "list"], ["list", "nodes"]]


def test_without_a_place_for_drivers_it_goes_to_a_head_without_gpus(fake: Fake) -> None:
    fake.nodes(node(True), node(False, GPU=8.0))
    call = submitted(fake, "--runs", "/r", "--name", "mine", "quickstart")
    assert "--entrypoint-resources" not in call


def test_it_does_not_go_to_a_head_with_gpus_by_accident(fake: Fake) -> None:
    fake.nodes(node(True, GPU=8.0), node(False))
    refused = fake.run(SUBMIT, "--runs", "/r", "--name", "mine", "quickstart")
    assert refused.returncode == 2 and "dgpo_driver" in refused.stderr
    assert "--entrypoint-resources" not in submitted(
        fake, "--driver", "head", "--runs", "/r", "--name", "mine", "quickstart"
    )
    fake.nodes(node(True, GPU=1.0))
    submitted(fake, "--runs", "/r", "--name", "mine", "quickstart")


def test_a_cluster_without_nodes_is_still_starting(fake: Fake) -> None:
    (fake.folder / "list-nodes").write_text("No resource in the cluster\n")
    done = fake.run(SUBMIT, "--runs", "/r", "--name", "mine", "quickstart", DGPO_NODES_WAIT_S="1")
    assert done.returncode == 2 and "still starting" in done.stderr


@pytest.mark.parametrize("first", ["No resource in the cluster\n", "[]"])
def test_a_cluster_that_has_just_started_is_asked_again(fake: Fake, first: str) -> None:
    (fake.folder / "list-nodes").rename(fake.folder / "list-nodes.then")
    (fake.folder / "list-nodes").write_text(first)
    call = submitted(fake, "--runs", "/r", "--name", "mine", "quickstart")
    assert option(call, "--entrypoint-resources") == '{"dgpo_driver": 0.01}'


@pytest.mark.parametrize(
    ("call", "text", "told"),
    [
        (
            "job-list",
            "Traceback\nray.exceptions.AuthenticationError: Authentication failed: Forbidden: Invalid\n",
            "RAY_AUTH_TOKEN",
        ),
        ("job-list", "Traceback\nConnectionError: Failed to connect to Ray at address: http://x\n", "tunnel"),
        ("list-nodes", "RuntimeError: no such thing\n", "no such thing"),
    ],
)
def test_what_ray_refuses_is_told_in_words(fake: Fake, call: str, text: str, told: str) -> None:
    fake.fails(call, text)
    done = fake.run(SUBMIT, "--runs", "/r", "--name", "mine", "quickstart")
    assert done.returncode == 2
    assert told in done.stderr and "Traceback" not in done.stderr
    assert not any(words[1:3] == ["job", "submit"] for words in fake.calls)


def test_without_a_token_nothing_is_asked(fake: Fake) -> None:
    done = fake.run(SUBMIT, "--runs", "/r", "quickstart", RAY_AUTH_TOKEN="")
    assert done.returncode == 2 and "ray get-auth-token --generate" in done.stderr
    assert not (fake.folder / "calls").exists()
    (fake.folder / ".ray").mkdir()
    (fake.folder / ".ray" / "auth_token").write_text("kept-token")
    submitted(fake, "--runs", "/r", "quickstart", RAY_AUTH_TOKEN="")
    off = fake.run(SUBMIT, "--runs", "/r", "quickstart", RAY_AUTH_TOKEN="", RAY_AUTH_MODE="disabled")
    assert off.returncode == 0 and off.stdout.startswith("RAY_AUTH_MODE=disabled ray job submit")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "deploy/submit.sh"),
        (("--runs", "/r"), "--resume RUN"),
        (("quickstart",), "DGPO_RUNS"),
        (("--runs", "runs", "quickstart"), "absolute"),
        (("--runs", "/r", "no-such-recipe"), "no recipe"),
        (("--runs", "/r", "/etc/passwd"), "inside of"),
        (("--runs", "/r", "--name", "../up", "quickstart"), "letters"),
        (("--runs", "/r", "--resume", "a", "--name", "b"), "--name"),
        (("--runs", "/r", "quickstart", "learner.max_steps"), "SECTION.KEY=VALUE"),
        (("--runs", "/r", "quickstart", "--json"), "SECTION.KEY=VALUE"),
        (("--runs", "/r", "quickstart", "run.directory=/x"), "--runs"),
        (("--runs", "/r", "--driver", "gpu", "quickstart"), "auto or head"),
        (("--runs", "/r", "--attempt", "0", "quickstart"), "--attempt"),
        (("--runs",), "needs a value"),
        (("--what", "quickstart"), "--runs DIR"),
    ],
)
def test_wrong_usage(fake: Fake, arguments: tuple[str, ...], told: str) -> None:
    done = fake.run(SUBMIT, *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert not (fake.folder / "calls").exists()


def attempt(fake: Fake, *arguments: str | Path) -> list[str]:
    done = fake.run(ATTEMPT, *arguments)
    assert done.returncode == 0, done.stderr
    return fake.calls[-1]


def test_the_first_attempt_begins_the_run(fake: Fake, tmp_path: Path) -> None:
    runs = tmp_path / "shared runs"
    call = attempt(fake, runs, "mine", "quickstart", "rewards.0.args={a: 1}")
    assert call == [
        *("python", "-m", "services.train", "--json", "--config", "quickstart"),
        *("--set", "run.name=mine", "--set", f"run.directory={runs}/mine", "--set", "rewards.0.args={a: 1}"),
    ]
    assert (runs / "mine").is_dir()


def test_a_later_attempt_goes_on_with_the_run_that_it_finds(fake: Fake, tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "mine" / "mine-20261125-100000-ab12"
    directory.mkdir(parents=True)
    (directory / "config.yaml").touch()
    (tmp_path / "runs" / "mine" / ".queue").mkdir()
    for recipe in ("-", "quickstart"):
        call = attempt(fake, tmp_path / "runs", "mine", recipe, "learner.max_steps=9")
        assert call == [
            *("python", "-m", "services.train", "--json", "--resume", str(directory)),
            *("--set", "learner.max_steps=9"),
        ]


def test_what_cannot_be_resumed(fake: Fake, tmp_path: Path) -> None:
    done = fake.run(ATTEMPT, tmp_path, "mine", "-")
    assert done.returncode == 2 and "nothing to resume" in done.stderr
    for name in ("a", "b"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        (tmp_path / "mine" / name / "config.yaml").touch()
    done = fake.run(ATTEMPT, tmp_path, "mine", "quickstart")
    assert done.returncode == 2 and "several run directories" in done.stderr
    assert fake.run(ATTEMPT, tmp_path).returncode == 2


@pytest.mark.parametrize(
    "script", sorted(p for p in (PROJECT_ROOT / "deploy").rglob("*") if p.suffix in (".sh", ".sbatch"))
)
def test_scripts_are_well_formed_and_can_be_run(script: Path) -> None:
    shell = script.read_text().splitlines()[0].rpartition("/")[2].removeprefix("env ")
    done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert os.access(script, os.X_OK)
