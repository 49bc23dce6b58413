"""What weights over NCCL need, and where it listens."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import torch

from services.config_file import ConfigError, load_config, load_for_evaluation
from services.ray_runtime import nccl_listens_where_ray_does
from services.suites.settings import without_prompts
from services.transports.nccl_pair import nccl_pairs
from services.transports.nccl_wire import CardWire

SHARES = ["learner.num_gpus=1", "rollout.num_gpus=0.5", "eval.num_gpus=0.5"]
WHOLE = ["learner.publish_through=nccl", "model.device=cuda", *SHARES]
LIBRARY = "cupy.cuda.nccl"


def test_parts_on_gpus_may_have_it() -> None:
    config = load_config("quickstart", WHOLE)
    assert config.learner.publish_through == "nccl"
    # Workers of `dgpo eval` read a checkpoint; there is no learner, on a GPU or not.
    assert without_prompts(load_for_evaluation("quickstart", WHOLE)).rollout.num_gpus == 0.5


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.device=cpu", "with model.device cpu: NCCL joins GPUs"),
        ("learner.num_gpus=0.5", r"with learner\.num_gpus 0\.5: a worker may be on the same GPU"),
        ("rollout.num_gpus=0", r"rollout\.num_gpus is 0, and NCCL brings weights to GPUs only"),
        ("eval.num_gpus=0", r"eval\.num_gpus is 0"),
    ],
)
def test_parts_without_a_gpu_are_refused(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"learner\.publish_through nccl") as caught:
        load_config("quickstart", [*WHOLE, override])
    assert caught.match(says)


@pytest.mark.parametrize("library", [None, SimpleNamespace(available=False)])
def test_a_process_without_the_library_says_what_to_install(
    library: SimpleNamespace | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, LIBRARY, library)
    with pytest.raises(ConfigError, match=r"pip install 'dgpo-cluster\[nccl\]'"):
        nccl_pairs(torch.device("cuda"))


def test_a_process_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, LIBRARY, SimpleNamespace(available=True))
    with pytest.raises(ConfigError, match="the model is on cpu here, and NCCL joins CUDA devices"):
        nccl_pairs(torch.device("cpu"))


def test_it_listens_on_the_interface_of_ray_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    # What it sets goes with the test.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    nccl_listens_where_ray_does()
    chosen = os.environ["NCCL_SOCKET_IFNAME"].removeprefix("=")
    assert "127.0.0.1" in {address.address for address in psutil.net_if_addrs()[chosen]}
    os.environ["NCCL_SOCKET_IFNAME"] = "ib0"
    nccl_listens_where_ray_does()
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0"


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy")
def test_nccl_itself_listens_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs no GPU; once in the life of a process."""
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    before = _listening()
    nccl_listens_where_ray_does()
    assert len(CardWire(importlib.import_module(LIBRARY), torch.device("cuda", 0)).unique()) == 128
    assert {address.ip for address in _listening() - before} == {"127.0.0.1"}


def _listening() -> set[Any]:
    return {place.laddr for place in psutil.Process().net_connections() if place.status == "LISTEN"}


class Communicator:
    """In place of CuPy's, which needs a GPU: joined while somebody gives up."""

    def __init__(self, aborts: Callable[[], None]) -> None:
        self.aborted = False
        aborts()

    def abort(self) -> None:
        self.aborted = True


def test_who_joins_after_an_abort_is_aborted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    made: list[Communicator] = []

    def join(*given: object) -> Communicator:
        made.append(Communicator(wire.abort))
        return made[0]

    wire = CardWire(SimpleNamespace(NcclCommunicator=join), torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="joined too late"):
        wire.join(b"", 0)
    assert made[0].aborted
