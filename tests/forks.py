"""Processes that cost little to start: forks of a server that has loaded once what tests need.

Never forks of the process that runs the tests. Threads that other tests have left there may hold a lock at
that moment, which stays locked in the fork for ever.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

PRELOADED = [
    "pytest",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.hf_storage",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "learner.curriculum",
    "learner.sharded_checkpoint",
    "learner.trainer",
]


def forks() -> ForkServerContext:
    """What they run, and its arguments, must be picklable."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
