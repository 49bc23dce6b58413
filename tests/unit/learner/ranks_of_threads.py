"""Ranks that are threads of this process: real process groups (gloo over loopback), in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from learner.ranks import Ranks

T = TypeVar("T")


class Rigged(Exception):
    """An error of one rank that a restart would not mend."""


def together(count: int, body: Callable[[Ranks], T], *, deadline_s: float = 60.0) -> list[T | Exception]:
    """What `body` returns or raises on each rank; a rank that has returned is gone."""
    store = dist.HashStore()

    def run(rank: int) -> T | Exception:
        torch.set_num_threads(1)
        group = dist.ProcessGroup(store, rank, count)
        gloo = dist.ProcessGroupGloo(store, rank, count, timedelta(seconds=deadline_s))
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        try:
            return body(Ranks(group, group, deadline_s=deadline_s, lasting=(Rigged,)))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def all_of(results: list[T | Exception]) -> list[T]:
    """Results of ranks none of which has failed."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return [result for result in results if not isinstance(result, Exception)]
