"""`dgpo plan`: what an update of a recipe costs, and how to split GPUs."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from services.cli_options import Json, Overrides, Recipe, emit, screen
from services.config_file import ConfigError, load_config


def plan(
    recipe: Recipe,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs to split.")],
    overrides: Overrides = None,
    tflops: Annotated[
        float | None, typer.Option("--tflops", help="Of a GPU in a run; default: 300, assumed.")
    ] = None,
    gpu_gib: Annotated[
        float | None,
        typer.Option("--gpu-gib", help="GiB of a GPU for tensors; default: 74, of one of 80 GB."),
    ] = None,
    network_gbit: Annotated[
        float | None, typer.Option("--network-gbit", help="Of a node; default: 10, assumed.")
    ] = None,
    queue_mb: Annotated[
        float | None,
        typer.Option(
            "--queue-mb-s", help="MB/s of the queue's server and its reader; default: 303, measured."
        ),
    ] = None,
    proxy_mb: Annotated[
        float | None,
        typer.Option("--proxy-mb-s", help="MB/s of images through Serve's proxy; default: 258, measured."),
    ] = None,
    reward_seconds: Annotated[
        list[str] | None,
        typer.Option(
            "--reward-seconds", metavar="REWARD=S", help="Of one replica an image, measured; may be repeated."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Split GPUs between rollout workers, learner and rewards: seconds an update, and the bottleneck."""
    from dataclasses import replace

    from services.planning.local import architecture
    from services.planning.plan import costs_of, make_plan
    from services.planning.show import as_json as plan_as_json
    from services.planning.show import shown
    from services.planning.traffic import Machine

    machine = Machine()
    if tflops is not None:
        machine = replace(machine, rate=_positive("--tflops", tflops) * 1e12)
    if gpu_gib is not None:
        machine = replace(machine, gpu_gib=_positive("--gpu-gib", gpu_gib))
    if network_gbit is not None:
        machine = replace(machine, network_bytes_s=_positive("--network-gbit", network_gbit) * 1e9 / 8)
    if queue_mb is not None:
        machine = replace(machine, queue_bytes_s=_positive("--queue-mb-s", queue_mb) * 1e6)
    if proxy_mb is not None:
        machine = replace(machine, proxy_bytes_s=_positive("--proxy-mb-s", proxy_mb) * 1e6)
    given = dict(map(_reward, reward_seconds or ()))
    config = load_config(recipe, overrides or ())
    model = architecture(config.model)
    with screen.status(f"counting the passes of {model.hub}"):
        costs = costs_of(config, model, machine, given)
    made = make_plan(costs, gpus)
    screen.print(shown(made), soft_wrap=True)
    if as_json:
        emit(plan_as_json(made))


def _positive(option: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{option} {value:g}: give a number above 0")
    return value


def _reward(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    try:
        value = float(seconds)
    except ValueError as error:
        raise ConfigError(f"--reward-seconds {text!r}: give REWARD=SECONDS, as ocr=0.007") from error
    return name, _positive(f"--reward-seconds {name}", value)
