"""`dgpo bench`: the benchmarks, each beside its floor or its baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from services.cli_options import Json, Overrides, emit, screen

bench = typer.Typer(
    help="Measure the system's own overheads, side by side with the floor.", no_args_is_help=True
)


@bench.command("queue")
def queue(as_json: Json = False) -> None:
    """Whole groups through the queue, against raw pipelined XADD/XREAD of the same bytes."""
    from benchmarks.queue import run_queue_bench

    _bench(run_queue_bench(screen), as_json)


@bench.command("weights")
def weights(as_json: Json = False) -> None:
    """75 MB of LoRA tensors to 8 workers, against the bare copies."""
    from benchmarks.weights import run_weights_bench

    _bench(run_weights_bench(screen), as_json)


@bench.command("overlap")
def overlap(as_json: Json = False) -> None:
    """Step time at staleness 0 and 1 with timed waits for model work."""
    from benchmarks.overlap import run_overlap_bench

    _bench(run_overlap_bench(screen), as_json)


@bench.command("memory")
def memory(as_json: Json = False) -> None:
    """Peak memory of an update against group size, with the deferred group weight and without."""
    from benchmarks.memory import run_memory_bench

    _bench(run_memory_bench(screen), as_json)


@bench.command("cost")
def cost(as_json: Json = False) -> None:
    """Forward passes and time of sampling and of an update, for each objective and several models."""
    from benchmarks.cost import run_cost_bench

    _bench(run_cost_bench(screen), as_json)


@bench.command("ranks")
def ranks(as_json: Json = False) -> None:
    """The same updates on one, two and four ranks of this machine."""
    from benchmarks.ranks import run_ranks_bench

    _bench(run_ranks_bench(screen), as_json)


@bench.command("gpu")
def gpu(
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A functional check on the CPU, no measurement.")
    ] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """SD3.5-medium with random weights on this GPU: rollouts, updates, weights and whole steps."""
    from benchmarks.gpu import run_gpu_bench

    def say(line: str) -> None:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)

    _bench(run_gpu_bench(say, tiny=tiny, overrides=overrides or ()), as_json)


@bench.command("load")
def load(
    plot: Annotated[Path | None, typer.Option(help="Draw it into this file (.svg).")] = None,
    as_json: Json = False,
) -> None:
    """The group queue under 8, 64 and 512 simulated workers with groups of 3 MB."""
    from benchmarks.load import run_load_bench

    result = run_load_bench(screen)
    if plot is not None:
        from benchmarks.plots import draw_load

        result["plot"] = str(draw_load(result["workers"], result["target_s"], plot))
    _bench(result, as_json)


@bench.command("ui")
def ui(as_json: Json = False) -> None:
    """The run page over 100,000 updates and 10,000 groups: milliseconds by address."""
    from benchmarks.ui import run_ui_bench

    _bench(run_ui_bench(screen), as_json)


@bench.command("submit")
def submit(
    runs: Annotated[
        int, typer.Option("--runs", min=1, help="Each on a new cluster; the fastest counts.")
    ] = 1,
    recipe: Annotated[str, typer.Option("--recipe", help="A YAML file here, or a name.")] = "quickstart",
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """From a new Ray cluster to the first update through `ray job submit`: seconds by phase."""
    from benchmarks.submit import run_submit_bench

    _bench(run_submit_bench(screen, runs=runs, recipe=recipe, overrides=overrides or ()), as_json)


@bench.command("telemetry")
def telemetry(
    updates: Annotated[int, typer.Option(min=5, help="Of the quickstart that it is held against.")] = 12,
    as_json: Json = False,
) -> None:
    """CPU seconds of rows, heartbeats, curves and metrics against those of an update of the quickstart."""
    from benchmarks.telemetry import run_telemetry_bench

    _bench(run_telemetry_bench(screen, updates=updates), as_json)


@bench.command("plan")
def plan(
    gpus: Annotated[
        str, typer.Option("--gpus", help="Sizes of the simulated cluster, with commas between them.")
    ] = "8,64,512",
    recipe: Annotated[str, typer.Option("--recipe", help="Whose update is planned.")] = (
        "sd35-medium-geneval-8gpu"
    ),
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """What `dgpo plan` predicts against a simulated cluster whose parts wait as long as they should take."""
    from benchmarks.plan import run_plan_bench

    sizes = [text.strip() for text in gpus.split(",")]
    if not all(size.isdecimal() and int(size) > 1 for size in sizes):
        raise typer.BadParameter(f"--gpus {gpus}: give numbers from 2 on, as 8,64,512")
    _bench(
        run_plan_bench(screen, gpus=list(map(int, sizes)), recipe=recipe, overrides=overrides or ()), as_json
    )


@bench.command("soak")
def soak(
    groups: Annotated[int, typer.Option(min=400, help="Trained in all.")] = 50_000, as_json: Json = False
) -> None:
    """Many groups through the real loops without any model: does memory grow?"""
    from benchmarks.soak import run_soak_bench

    _bench(run_soak_bench(screen, groups=groups), as_json)


@bench.command("chaos")
def chaos(
    faults: Annotated[
        str,
        typer.Option("--faults", help="Names with commas between them; none: all that one rank can have."),
    ] = "",
    minutes: Annotated[float, typer.Option(help="No new run is begun behind these.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the order and the moments of the faults.")] = 0,
    steps: Annotated[int, typer.Option(min=4, help="Updates of a run.")] = 150,
    most: Annotated[int | None, typer.Option(min=1, help="Faults in all; none: while there is time.")] = None,
    runs: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the runs (disk-full: until umount); none: a temporary one."),
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Kill and pause parts of real runs, and hold their weights against those of an undisturbed one."""
    from benchmarks.chaos import run_chaos_bench

    names = tuple(filter(None, map(str.strip, faults.split(","))))
    result = run_chaos_bench(
        screen,
        minutes=minutes,
        faults=names,
        seed=seed,
        steps=steps,
        most=most,
        runs=runs,
        overrides=overrides or (),
    )
    _bench(result, as_json)
    if not result["survived"]:
        raise typer.Exit(1)


@bench.command("compare")
def compare(
    name: Annotated[str, typer.Argument(help="search, objectives, ablations, staleness or conditions.")],
    runs: Annotated[Path, typer.Option(help="Folder of the runs; what is finished there is kept.")] = Path(
        "runs/compare"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each entry.")] = 3,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Whole training runs side by side: score against seconds and images, over seeds."""
    from benchmarks.comparison import run_comparison
    from benchmarks.comparisons import COMPARISONS

    if name not in COMPARISONS:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(COMPARISONS)}")
    _bench(run_comparison(name, seeds=seeds, runs=runs, screen=screen, overrides=overrides or ()), as_json)


def _bench(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit(result)
