"""Where weights are promised bit for bit, a GPU may not add up in any order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_runs import trainer_of

import learner.trainer
from policy.one_order import VARIABLE, WORKSPACE, wants_one_order
from rollout_workers.policy_sampler import PolicySampler
from services.config_file import PROJECT_ROOT, load_config

UPDATES = """
import os, sys, tempfile
from pathlib import Path
from typing import Any
sys.path.insert(0, "tests/unit/learner")
import torch
from sharded_runs import state_of, train, trainer_of
from policy.one_order import add_up_in_one_order

def digest():
    with tempfile.TemporaryDirectory() as place:
        trainer = trainer_of(Path(place), None)
        train(trainer, range(2))
        return {name: tensor.clone() for name, tensor in state_of(trainer).items()}

free = digest()
add_up_in_one_order()
assert torch.are_deterministic_algorithms_enabled()
assert not torch.is_deterministic_algorithms_warn_only_enabled()
bound = digest()
assert all(torch.equal(bound[name], tensor) for name, tensor in free.items())
print(os.environ.pop("CUBLAS_WORKSPACE_CONFIG"))
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
add_up_in_one_order()
print(os.environ["CUBLAS_WORKSPACE_CONFIG"])
"""


@pytest.mark.parametrize(
    ("device", "overrides", "wanted"),
    [
        ("cuda", ("queue.max_staleness=0",), True),
        ("cuda:1", ("queue.max_staleness=0",), True),
        ("cpu", ("queue.max_staleness=0",), False),
        ("cuda", ("queue.max_staleness=1",), False),
        ("cuda", ("queue.max_staleness=0", "model.compile=true"), False),
    ],
)
def test_only_where_it_is_promised(device: str, overrides: tuple[str, ...], wanted: bool) -> None:
    assert wants_one_order(load_config("quickstart", list(overrides)), torch.device(device)) is wanted


def test_a_trainer_asks_for_it_before_the_model_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr("learner.trainer.wants_one_order", lambda config, device: True)
    monkeypatch.setattr("learner.trainer.add_up_in_one_order", lambda: order.append("one order"))
    load = learner.trainer.load_policy

    def loaded(*given: Any, **named: Any) -> Any:
        order.append("model")
        return load(*given, **named)

    monkeypatch.setattr("learner.trainer.load_policy", loaded)
    trainer_of(tmp_path, None)
    assert order == ["one order", "model"]


def test_a_sampler_asks_for_it_before_the_model_is_there_and_is_only_warned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loading(Exception): ...

    asked: list[bool] = []

    def load(*given: Any, **named: Any) -> Any:
        raise Loading

    sampler = "rollout_workers.policy_sampler"
    monkeypatch.setattr(f"{sampler}.wants_one_order", lambda config, device: True)
    monkeypatch.setattr(f"{sampler}.add_up_in_one_order", lambda *, warn_only: asked.append(warn_only))
    monkeypatch.setattr(f"{sampler}.load_policy", load)
    with pytest.raises(Loading):
        PolicySampler(load_config("quickstart", []), tmp_path, transport=None)  # type: ignore[arg-type]
    assert asked == [True]


def test_no_operation_of_an_update_is_refused_and_none_is_another_on_a_cpu() -> None:
    """In a process of its own: the setting is the process's. Kernels of a GPU are not seen here."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", UPDATES],
        cwd=PROJECT_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    # What a user has set is kept.
    assert (done.returncode, done.stdout.split()) == (0, [WORKSPACE, ":16:8"]), done.stderr
