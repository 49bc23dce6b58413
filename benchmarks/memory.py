"""Peak memory of an update against group size: deferred group weight, and whole groups in one forward.

Every figure is of a fresh process that makes one update of the quickstart's model, of one group of random
latents at one timestep: bytes of tensors that were allocated at once beyond those there before it, from the
allocator's own events (on a GPU its statistics). The gradients of both ways are compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from learner.update import TrainingGroup, Updater
from policy import load_policy
from services.config import Config
from services.config_file import load_config

SIZES = (4, 8, 16, 32, 64)
FLAT_TARGET, GRADIENT_TARGET = 0.05, 1e-5
DEADLINE_S = 300.0


def run_memory_bench(screen: Console | None = None) -> dict[str, Any]:
    """Peak bytes of an update by group size.

    Returns:
        `deferred` and `whole`, group size -> peak bytes; `growth` of the deferred one from the smallest to
        the largest group; `gradient_error`, the largest relative difference of the two gradients over the
        group sizes; `met`.
    """
    peaks: dict[str, dict[int, int]] = {"deferred": {}, "whole": {}}
    jobs = [(way, size) for size in SIZES for way in peaks]
    for way, size in track(jobs, "measuring", console=screen or Console(stderr=True), transient=True):
        peaks[way][size] = _peak(size, 1 if way == "deferred" else size)
    deferred = peaks["deferred"]
    growth = deferred[SIZES[-1]] / deferred[SIZES[0]] - 1
    error = max(gradient_error(size) for size in SIZES)
    result = {
        "benchmark": "memory",
        **{way: {str(size): peak for size, peak in by_size.items()} for way, by_size in peaks.items()},
        "growth": growth,
        "gradient_error": error,
        "target": {"growth": FLAT_TARGET, "gradient_error": GRADIENT_TARGET},
        "met": growth <= FLAT_TARGET and error <= GRADIENT_TARGET,
    }
    if screen is not None:
        screen.print(_table(result))
    return result


def gradient_error(size: int) -> float:
    """||deferred - whole|| / ||whole|| of the gradients of one update, float32."""
    deferred, whole = _gradient(size, 1), _gradient(size, size)
    return float((deferred - whole).norm() / whole.norm())


def _config(size: int, micro_batch: int) -> Config:
    return load_config(
        "quickstart",
        [
            f"rollout.group_size={size}",
            f"learner.micro_batch={micro_batch}",
            "learner.groups_per_step=1",
            "learner.optimizer_steps=1",
            "learner.max_grad_norm=1e9",
            "objective.kl=0",
            "objective.timesteps.per_update=1",
            "objective.reference=frozen",
        ],
    )


def _update(size: int, micro_batch: int) -> tuple[Updater, TrainingGroup]:
    config = _config(size, micro_batch)
    policy = load_policy(config.model, text_encoders=True, vae=False, base=True, seed=0)
    with torch.no_grad():
        # The frozen reference is the model as it was: a policy that has moved has scores to weigh.
        for number, parameter in enumerate(policy.trainable().values()):
            source = torch.Generator().manual_seed(number)
            parameter.add_(torch.randn(parameter.shape, generator=source).to(parameter), alpha=1e-3)
    source = torch.Generator().manual_seed(1)
    group = TrainingGroup(
        ordinal=0,
        latents=torch.randn((size, *policy.latent_shape()), generator=source),
        rewards={"ocr": torch.rand(size, generator=source).tolist()},
        condition=policy.encode('a sign that says "K7QX"'),
    )
    return Updater(policy, config), group


def _gradient(size: int, micro_batch: int) -> torch.Tensor:
    updater, group = _update(size, micro_batch)
    found: list[torch.Tensor] = []
    parameters = list(updater.policy.trainable().values())

    def keep(*_: Any) -> None:
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).clone())

    updater.trained.optimizer.register_step_pre_hook(keep)
    updater.step([group], 0)
    return found[0]


def _peak(size: int, micro_batch: int) -> int:
    """In a process of its own: allocators keep what they once had."""
    command = [sys.executable, "-m", "benchmarks.memory", str(size), str(micro_batch)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    if done.returncode:
        raise RuntimeError(f"group size {size}, micro-batch {micro_batch}: {done.stderr[-2000:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def _measure(size: int, micro_batch: int) -> int:
    torch.set_num_threads(1)
    updater, group = _update(size, micro_batch)
    if updater.policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        updater.step([group], 0)
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        updater.step([group], 0)
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _table(result: dict[str, Any]) -> Table:
    table = Table(title="peak memory of an update, MiB", title_justify="left")
    for heading in ("group size", "deferred, micro-batch 1", "whole group"):
        table.add_column(heading, justify="right")
    for size in SIZES:
        row = [result[way][str(size)] / 1024**2 for way in ("deferred", "whole")]
        table.add_row(str(size), *(f"{value:.1f}" for value in row))
    table.caption = (
        f"growth {result['growth']:+.1%} (target <= {FLAT_TARGET:.0%}), gradients differ by "
        f"{result['gradient_error']:.1e} (target <= {GRADIENT_TARGET:.0e})"
        + ("" if result["met"] else "  missed")
    )
    return table


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]), int(sys.argv[2]))))  # noqa: T201
