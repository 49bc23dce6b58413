"""What one GPU makes of SD3.5-medium: rollouts, updates, weights and whole steps, as a share of its peak.

    python -m benchmarks.gpu [--json] [--tiny] [--set SECTION.KEY=VALUE]        or: dgpo bench gpu

Needs torch, diffusers, transformers and peft with what they bring, pydantic, and for weights xxhash: neither
Ray nor Redis nor a network. Without a GPU, or with --tiny, a model of a few thousand weights goes through the
same code on the CPU: a check that it works, whose figures say nothing.

What is in a figure
- The project's own policy, solver, VAE decoding and update with the settings of the recipe
  `sd35-medium-geneval`, on the real architecture with random weights. Random, too, are conditions, of the
  real shapes, and rewards (reward models are in no figure).
- Text encoders, of the real architecture with random weights, are timed by themselves, on the GPU, and their
  seconds are added to both steps: one prompt a group here, as workers encode it; in the baseline every sample
  and its negative prompt.
- A share of the peak counts the FLOPs that the mathematics needs (services/planning/published.py), relative
  to a large matmul of the same dtype in the same run. A pass that is made again to save memory costs time and
  is not counted as work.
- Weights go from parameters to bytes, are proven, and go back into parameters, in one process: the object
  store, the network and the announcement are not in it.
- The baseline (benchmarks/gpu_baseline.py) makes the same step in plain diffusers and peft.

Time. An image costs 10 steps x 2 (CFG) x 2.5 TFLOP = 50 to sample, and 4 timesteps x (5.3 forward and
backward, 2 x 2.5 reference and base, 2.5 more where a group comes in pieces) = 41 to 51 to train on. Sampled
and trained on are at most 5 x 24 images for the rates, 2.5 x 64 for steps and 1.25 x 64 for the baseline:
360 x 101 TFLOP = 36 PFLOP, or 180 s at 200 TFLOP/s, which is 30 % of what an H100's matmuls reach. To make
three models and move 10 GB of weights is another minute. Past `HALF_S` nothing is repeated, so that a GPU of
half that rate is done in 9 minutes too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu_measure import Bench, Say, Sizes
from services.config_file import ConfigError

REAL = Sizes("sd35-medium")
TINY = Sizes(
    "sd35-medium-tiny",
    (
        *("model.height=16", "model.width=16", "model.dtype=float32", "model.device=cpu"),
        *("model.lora.rank=2", "rollout.steps=5"),
    ),
    group=4,
    step_group=4,
    step_groups=2,
    rounds=1,
    matrix=128,
)


def run_gpu_bench(say: Say, *, tiny: bool = False, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Everything, in turn.

    Args:
        say: takes a line for people.
        tiny: the check on the CPU; without a GPU that is what is run in any case.
        overrides: of the recipe.

    Returns:
        `rollout` (images/s) and `learner` (samples/s: of an update, each at all its timesteps), both with
        `share` of `peak_tflops` and `peak_gib`; `weights` (seconds, LoRA and full); `text` (seconds a group);
        `step` and `baseline` (seconds of a whole step, `text_s` of them encoding); `ratios`, baseline over
        ours; with a GPU `targets`, as text.

    Raises:
        RuntimeError: a latent, an image or a loss is not finite, or weights did not arrive.
    """
    tiny = tiny or not torch.cuda.is_available()
    if tiny:
        say("FUNCTIONAL CHECK on the CPU with a tiny model: its figures say nothing of any speed")
    bench = Bench(say, TINY if tiny else REAL, tuple(overrides))
    result: dict[str, Any] = {"benchmark": "gpu", "functional_check": tiny, **bench.machine()}
    result |= _with_adapters(bench)
    bench.free()
    result["weights"]["full"] = bench.weights(bench.policy("full"))
    bench.free()
    result["baseline"] = bench.fitting(bench.sizes.step_group, bench.baseline)
    bench.free()
    result["text"] = bench.text()
    for part, each in (("step", "once_s"), ("baseline", "each_s")):
        text_s = bench.sizes.step_groups * result["text"][each]
        result[part] |= {"text_s": text_s, "step_s": result[part]["step_s"] + text_s}
    result["ratios"] = {
        name: result["baseline"][f"{name}_s"] / result["step"][f"{name}_s"]
        for name in ("rollout", "update", "step")
    }
    result["took_s"] = time.perf_counter() - bench.started
    if not tiny:
        result["targets"] = against_targets(result)
    for line in _lines(result):
        say(line)
    return result


def _with_adapters(bench: Bench) -> dict[str, Any]:
    """All that one policy with adapters is enough for; it is gone afterwards."""
    policy, sizes = bench.policy("lora"), bench.sizes
    return {
        "rollout": bench.rollout(policy),
        "learner": bench.fitting(sizes.group, lambda micro: bench.learner(policy, micro)),
        "step": bench.fitting(sizes.step_group, lambda micro: bench.step(policy, micro)),
        "weights": {"lora": bench.weights(policy)},
    }


def against_targets(result: dict[str, Any]) -> dict[str, str]:
    """What the project wants to reach beside what was measured, as text."""
    rate, seconds = result["ratios"]["step"], result["step"]["step_s"]
    shares = {
        part: f"{part}: {result[part]['share']:.0%} of the measured peak; target: at least 45 %"
        for part in ("rollout", "learner")
    }
    return {
        **shares,
        "end_to_end": f"whole step: {rate:.2f} times the baseline's rate; target: at least 2",
        "step": f"whole step: {seconds:.1f} s on {result['device']}; target: at most 40 s on an H200",
    }


def _lines(result: dict[str, Any]) -> list[str]:
    rollout, learner, step, baseline = (result[name] for name in ("rollout", "learner", "step", "baseline"))

    def memory(part: dict[str, Any]) -> str:
        return "" if part["peak_gib"] is None else f", {part['peak_gib']:.1f} GiB at most"

    lines = [
        f"{result['device']}, torch {result['torch']}, diffusers {result['diffusers']}",
        f"peak of a large matmul {result['peak_tflops']:.3g} TFLOP/s",
        f"rollout {rollout['images_per_s']:.2f} images/s, {rollout['share']:.1%} of peak{memory(rollout)}",
        f"learner {learner['samples_per_s']:.2f} samples/s, {learner['share']:.1%} of peak{memory(learner)}, "
        f"micro-batch {learner['micro_batch']}",
    ]
    for kind, found in result["weights"].items():
        told = found.get("not_measured") or (
            f"published in {found['published_s']:.3f} s, installed after {found['installed_s']:.3f} s"
        )
        lines.append(f"weights, {kind}: {found.get('mb', 0):.0f} MB, {told}")
    for name, part in (("step", step), ("baseline", baseline)):
        lines.append(
            f"{name} of {part['images']} images: {part['step_s']:.2f} s = text {part['text_s']:.2f} + "
            f"rollout and decoding {part['rollout_s']:.2f} + update {part['update_s']:.2f}{memory(part)}, "
            f"micro-batch {part['micro_batch']}"
        )
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in result["ratios"].items())
    lines.append(f"baseline's time over ours: {ratios}")
    lines.append(f"not in any figure: reward models, queue, network; took {result['took_s']:.0f} s")
    if result["functional_check"]:
        lines.append("FUNCTIONAL CHECK: these figures say nothing of any speed")
    return [*lines, *result.get("targets", {}).values()]


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m benchmarks.gpu`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--tiny", action="store_true", help="a functional check on the CPU")
    parser.add_argument(
        *("--set",),
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="of the recipe",
    )
    options = parser.parse_args(arguments)
    try:
        result = run_gpu_bench(
            lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
            tiny=options.tiny,
            overrides=options.overrides,
        )
    except ConfigError as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps(result))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
