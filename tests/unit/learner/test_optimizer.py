"""AdamW with moments of 8 bits: near to AdamW, a quarter of its bytes, and continued to the bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from ranks_of_threads import all_of, together
from torch import Tensor, nn
from toy_policy import ToyPolicy, ToyTransformer, toy_config, training_groups

from learner.checkpoint import read_checkpoint, write_checkpoint
from learner.follower import begin_together
from learner.ranks import Ranks
from learner.update import Updater
from policy.base import Policy
from services.config import ModelConfig
from services.config_file import PROJECT_ROOT, ConfigError

APART = PROJECT_ROOT / ".venv" / "8bit"
"""Where `make` installs bitsandbytes: peft imports it wherever it finds it, in every process."""
WIDTH = 3000
"""Some of the tensors have more than 4096 elements, and one has fewer."""


@pytest.fixture(autouse=True)
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(APART)


class WidePolicy(ToyPolicy):
    def __init__(self) -> None:
        torch.manual_seed(0)
        network = ToyTransformer().float()
        shapes = {"inner": (WIDTH, 2), "outer": (2, WIDTH), "time": (WIDTH,), "text": (WIDTH, 3)}
        for name, shape in shapes.items():
            setattr(network, name, nn.Parameter(torch.randn(shape) / 50))
        Policy.__init__(self, ModelConfig(path="toy", train="full", device="cpu"), None, network, base=True)
        self.forwards = 0


def updater(optimizer: str, ranks: Ranks | None = None) -> Updater:
    config = toy_config(learner={"optimizer": optimizer, "learning_rate": 0.001, "optimizer_steps": 2})
    return Updater(WidePolicy(), config, ranks)


def trained(one: Updater, steps: range) -> Updater:
    for step in steps:
        one.step(training_groups(2, seed=step), step)
    return one


def everything(one: Updater) -> dict[str, Tensor]:
    return {f"{part}.{name}": t.clone() for part, held in one.state().items() for name, t in held.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], t) for name, t in other.items())


def test_a_continuation_from_a_checkpoint_is_bit_identical(tmp_path: Path) -> None:
    straight = trained(updater("adamw8bit"), range(3))
    write_checkpoint(tmp_path, 3, straight.state(), {}, keep=1)
    resumed = updater("adamw8bit")
    found = read_checkpoint(tmp_path / "checkpoints" / "step-3")
    resumed.load_state(found.state)
    moments = found.state["optimizer"]
    assert moments["state1.inner"].dtype == torch.uint8
    assert moments["state1.time"].dtype == torch.float32
    assert moments["step"].tolist() == [6.0] * 4
    trained(straight, range(3, 5))
    assert equal(everything(trained(resumed, range(3, 5))), everything(straight))


def test_it_moves_as_adamw_does_for_a_third_of_the_bytes() -> None:
    start = WidePolicy().tensors()
    ends, sizes = [], []
    for name in ("adamw", "adamw8bit"):
        one = trained(updater(name), range(5))
        ends.append(torch.cat([(t - start[n]).flatten() for n, t in one.policy.tensors().items()]))
        sizes.append(sum(tensor.nbytes for tensor in one.state()["optimizer"].values()))
    assert float(torch.cosine_similarity(*ends, dim=0)) > 0.98
    assert not torch.equal(*ends)
    assert sizes[1] < sizes[0] / 2.5


def test_a_state_that_would_be_read_otherwise_is_refused() -> None:
    one = trained(updater("adamw8bit"), range(1))
    state = {part: {n: t.clone() for n, t in held.items()} for part, held in one.state().items()}
    other = updater("adamw8bit")
    before = everything(other)
    state["optimizer"]["qmap2"] += 1e-3
    with pytest.raises(ValueError, match="qmap2 is not that of the installed bitsandbytes"):
        other.load_state(state)
    with pytest.raises(ValueError, match=r"state of optimizer.*learner\.optimizer"):
        other.load_state(updater("adamw").state())
    assert equal(everything(other), before)


def test_other_ranks_take_the_moments_of_rank_0() -> None:
    made = [trained(updater("adamw8bit"), range(1 + rank)) for rank in range(2)]

    def body(ranks: Ranks) -> dict[str, Tensor]:
        own = made[ranks.rank]
        own._ranks = own.trained._ranks = ranks
        begin_together(ranks, own)
        return everything(own)

    expected = everything(made[0])
    assert not equal(everything(made[1]), expected)
    assert all(equal(found, expected) for found in all_of(together(2, body)))


def test_without_its_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"pip install 'dgpo-cluster\[8bit\]'"):
        updater("adamw8bit")
