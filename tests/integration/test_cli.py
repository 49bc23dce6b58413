"""`dgpo`, as a user runs it: a process of its own with its own Ray, Serve and Valkey."""

from __future__ import annotations

import contextlib
import importlib.metadata
import ipaddress
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from services.cli import app

pytestmark = [pytest.mark.integration, pytest.mark.timeout(420)]

SMALL = [
    "rollout.group_size=4",
    "rollout.steps=4",
    "objective.timesteps.first=4",
    "objective.timesteps.skip=0",
    "learner.groups_per_step=2",
    "learner.micro_batch=4",
    "eval.every_steps=0",
    "eval.final_prompts=8",
]
DGPO = [sys.executable, "-m", "services.cli"]


def dgpo(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [*DGPO, *arguments], capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )


def within(*arguments: str, code: int = 0) -> Result:
    """In this process, which has imported what it needs."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code, done.output
    return done


def settings(folder: Path, *more: str) -> list[str]:
    pairs = [*SMALL, f"run.directory={folder}", *more]
    return [word for pair in pairs for word in ("--set", pair)]


def result_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small whole quickstart."""
    folder = tmp_path_factory.mktemp("runs")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [*DGPO, "quickstart", "--json", *settings(folder, "learner.max_steps=3")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    heard: dict[str, set[str]] = {}
    over = threading.Event()
    watching = threading.Thread(target=listen, args=(process.pid, heard, over))
    watching.start()
    out, err = process.communicate(timeout=300)
    over.set()
    watching.join()
    assert process.returncode == 0, err
    return result_of(out) | {"listening": heard}


def listen(pid: int, heard: dict[str, set[str]], over: threading.Event) -> None:
    """Addresses at which a process and its children listen, at any time -> who does."""
    while not over.wait(0.3):
        with contextlib.suppress(psutil.Error):
            driver = psutil.Process(pid)
            for process in (driver, *driver.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    for found in process.net_connections():
                        if found.status == "LISTEN":
                            heard.setdefault(found.laddr.ip, set()).add(process.name())


def test_nothing_of_a_run_listens_beyond_loopback(finished: dict[str, Any]) -> None:
    heard = finished["listening"]
    beyond = {
        ip: who
        for ip, who in heard.items()
        if not ipaddress.ip_address(ip.removeprefix("::ffff:")).is_loopback
    }
    assert beyond == {}
    # Ray and its workers, the queue server, and Serve's proxy.
    assert len(set().union(*heard.values())) >= 5


def test_timesteps_that_cannot_be_are_refused_on_resume_before_anything_starts(
    finished: dict[str, Any],
) -> None:
    changed = ["learner.max_steps=4", "objective.timesteps={first: null, t_min: 0.9, skip: 0}"]
    words = [word for pair in changed for word in ("--set", pair)]
    done = dgpo("train", "--resume", finished["run_dir"], *words, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "lower per_update, skip or t_min" in done.stderr


def test_quickstart_prints_its_result(finished: dict[str, Any]) -> None:
    assert finished["steps"] == 3
    assert finished["groups"] == 6
    assert finished["images"] == 24
    assert finished["heldout_prompts"] == 8
    assert finished["max_staleness_seen"] <= 1
    for prefix in ("", "independent_"):
        for kind in ("score", "exact"):
            for when in ("before", "after"):
                assert 0 <= finished[f"{prefix}{kind}_{when}"] <= 1
                assert finished[f"{prefix}{kind}_{when}_se"] >= 0
    for part in ("driver", "learner-0", "rollout-0", "rollout-1", "evaluator", "queue server"):
        assert finished["peak_memory_bytes"][part] > 1024**2


def test_the_run_directory_is_complete(finished: dict[str, Any]) -> None:
    run = Path(finished["run_dir"])
    page = (run / "report.html").read_text()
    assert "<html" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for place in ("config.yaml", "environment.json", "epoch.json", "metrics.jsonl"):
        assert (run / place).is_file()
    assert (run / "checkpoints" / "step-3" / "manifest.json").is_file()
    assert list((run / "tensorboard").iterdir())


def test_no_secret_is_in_what_a_run_leaves_to_read(finished: dict[str, Any]) -> None:
    run = Path(finished["run_dir"])
    secrets = [
        (run / "secrets" / "reward.token").read_text(),
        (run / "queue" / "password").read_text().strip(),
    ]
    assert all(len(secret) >= 16 for secret in secrets)
    readable = [
        file
        for file in run.rglob("*")
        if file.is_file() and file.parent.name not in ("secrets", "queue") and file.stat().st_size < 10**7
    ]
    assert len(readable) > 5
    for file in readable:
        content = file.read_bytes()
        assert not any(secret.encode() in content for secret in secrets), file


def test_stock_diffusers_loads_the_export(finished: dict[str, Any]) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(Path(finished["run_dir"]) / "export" / "pipeline")
    picture = pipeline(
        'a sign that says "K7QX"',
        height=32,
        width=64,
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=1,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert picture.size == (64, 32)
    assert np.asarray(picture).std() > 1


@pytest.mark.usefixtures("ray_local")
def test_eval_and_report_and_export_work_on_a_run(finished: dict[str, Any], tmp_path: Path) -> None:
    run = finished["run_dir"]
    scored = within("eval", run, "--json")
    again = result_of(scored.stdout)
    assert again["rewards"]["ocr"]["mean"] == pytest.approx(finished["score_after"], abs=1e-6)
    within("report", run)
    within("export", run, "--out", str(tmp_path / "out"), "--weights", "policy", "--only", "pipeline")
    assert (tmp_path / "out" / "pipeline" / "model_index.json").is_file()


def test_a_signal_to_the_group_ends_cleanly(tmp_path: Path) -> None:
    """Going on from there: tests/chaos, and the slow ones of test_training.py."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a sign that says "OAK"\na sign that says "ELM"\n')
    alone = (
        "learner.max_steps=400",
        "rewards=[{name: jpeg, app: jpeg, num_cpus: 0.05}]",
        # No held-out prompts: no evaluator.
        f"prompts={{source: file, path: {prompts}}}",
    )
    command = [*DGPO, "train", "quickstart", "--json", *settings(tmp_path, *alone)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    assert process.stdout is not None
    lines: list[str] = []
    trained = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "step 2/" in line or "step 3/" in line:
                trained.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert trained.wait(timeout=240), "".join(lines)
        # As `timeout` does it, and a terminal with Ctrl-C: to every process of the group.
        os.killpg(process.pid, signal.SIGTERM)
        output = process.stdout.read()
        assert process.wait(timeout=120) == 130, "".join(lines)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    stopped = result_of(output)
    assert stopped["interrupted"]
    step = stopped["steps"]
    assert (Path(stopped["run_dir"]) / "checkpoints" / f"step-{step}" / "manifest.json").is_file()


@pytest.mark.slow
def test_ctrl_c_while_the_parts_start_ends_the_run_there(tmp_path: Path) -> None:
    command = [*DGPO, "train", "quickstart", *settings(tmp_path, "learner.max_steps=400")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "starting the reward servers" in line:
                os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=120) == 130, "".join(lines)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "stopped before training began" in lines[-1]
    assert not any("step 1/" in line for line in lines)


def test_the_version_is_that_of_the_package() -> None:
    done = dgpo("--version", timeout=60)
    assert done.stdout == f"dgpo-cluster {importlib.metadata.version('dgpo-cluster')}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["train", "quickstart", "--set", "learner.max_step=3"], 2, "did you mean 'max_steps'"),
        (["train"], 2, "--resume RUN_DIR"),
        (["train", "--resume", "/nonexistent"], 2, "not a run directory"),
        (["train", "nothing"], 2, "quickstart"),
        (["train", "offline", "--set", "prompts.path=/nonexistent"], 2, "make one with dgpo record"),
        (
            ["train", "quickstart", "--set", "objective.timesteps={first: null, t_min: 0.9}"],
            2,
            "lower per_update, skip or t_min",
        ),
        (["record", "quickstart", "--groups", "2", "--out", "/"], 2, "exists and is not an empty directory"),
        (["report", "/nonexistent"], 2, "not a run directory"),
        (["config", "quickstart", "--set", "rollout.steps=x"], 2, "rollout.steps"),
        (["quickstarts"], 2, "No such command"),
    ],
)
def test_wrong_usage_is_named(arguments: list[str], code: int, named: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [*DGPO, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert (done.returncode, named in done.stderr) == (code, True), done.stderr


def test_config_prints_what_a_run_would_use() -> None:
    done = dgpo("config", "quickstart", "--set", "learner.max_steps=7", "--json")
    assert done.returncode == 0
    assert result_of(done.stdout)["learner"]["max_steps"] == 7


def test_doctor_names_what_is_missing_and_the_remedy() -> None:
    assert result_of(within("doctor", "quickstart", "--json").stdout)["ok"]
    wrongly = ("--set", "model.path=no/such/model/here", "--set", "queue.url=redis://127.0.0.1:9")
    bad = within("doctor", "quickstart", "--json", *wrongly, code=1)
    wrong = {finding["what"]: finding for finding in result_of(bad.stdout)["findings"] if not finding["ok"]}
    assert set(wrong) == {"model", "queue"}
    assert all(finding["remedy"] for finding in wrong.values())
