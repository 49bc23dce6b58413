"""A communicator of two processes: over NCCL where there are GPUs, and over TCP in its place.

Needs neither Ray nor a queue.
"""

from __future__ import annotations

import importlib
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from services.transports.nccl_wire import CardWire, Wire
from tests.integration.nccl_gpus import gpus_to_join, needs_nccl
from tests.integration.tcp_wire import TcpWire

pytestmark = pytest.mark.integration

DEADLINE_S = 120.0
SIZES = (8, 1, 3 * 1024**2 + 5, 64 * 1024**2)
WIRES = ["tcp", pytest.param("nccl", marks=needs_nccl)]


def make(kind: str, rank: int) -> Wire:
    if kind == "tcp":
        return TcpWire()
    nccl = importlib.import_module("cupy.cuda.nccl")
    return CardWire(nccl, torch.device("cuda", gpus_to_join()[rank]))


def content(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(256, (size,), dtype=torch.uint8, generator=generator)


def other_process(kind: str, side: Connection, work: Callable[[Wire], Any]) -> None:
    wire = make(kind, 1)
    wire.join(side.recv_bytes(), 1)
    side.send(work(wire))
    # The communicator stays until the first side has what it wants of it.
    side.poll(DEADLINE_S)


@contextmanager
def joined(kind: str, work: Callable[[Wire], Any]) -> Iterator[tuple[Wire, Connection]]:
    """The first side's wire, and by what the other one tells what its work came to."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    other = context.Process(target=other_process, args=(kind, there, work), daemon=True)
    other.start()
    wire = make(kind, 0)
    try:
        unique = wire.unique()
        here.send_bytes(unique)
        wire.join(unique, 0)
        yield wire, here
    finally:
        here.close()
        wire.abort()
        other.join(DEADLINE_S)
        other.kill()


def take(wire: Wire) -> list[bool]:
    taken = [torch.empty(size, dtype=torch.uint8) for size in SIZES]
    for tensor in taken:
        wire.receive(tensor, 0)
    return [torch.equal(tensor, content(size)) for tensor, size in zip(taken, SIZES, strict=True)]


@pytest.mark.parametrize("kind", WIRES)
def test_bytes_arrive_in_another_process(kind: str) -> None:
    with joined(kind, take) as (wire, other):
        for size in SIZES:
            wire.send(content(size), 1)
        assert other.poll(DEADLINE_S) and other.recv() == [True] * len(SIZES)


def nothing(wire: Wire) -> None:
    """Never sends."""


@pytest.mark.parametrize("kind", WIRES)
def test_an_abort_ends_a_call_that_nobody_answers(kind: str) -> None:
    said: list[BaseException] = []

    def wait() -> None:
        try:
            wire.receive(torch.empty(8, dtype=torch.uint8), 1)
        except RuntimeError as error:
            said.append(error)

    with joined(kind, nothing) as (wire, _):
        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive() and not said
        wire.abort()
        waiting.join(DEADLINE_S)
        assert not waiting.is_alive() and said
