"""`dgpo`: everything a user does, from here.

Promises
- Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted after a clean checkpoint.
- With --json the last line of standard output is one JSON object; what is for people goes to standard error.
- Nothing heavy is imported before it is needed: `dgpo --help` answers at once.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from services import cli_eval
from services.cli_reward import reward
from services.config_file import ConfigError, dump_config, load_config
from services.exit_codes import run

app = typer.Typer(
    name="dgpo",
    help="Post-train text-to-image models with Direct Group Preference Optimization.",
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
bench = typer.Typer(
    help="Measure the system's own overheads, side by side with the floor.", no_args_is_help=True
)
app.add_typer(bench, name="bench")
app.add_typer(reward, name="reward")

screen = Console(stderr=True)

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="Override a value of the recipe; may be repeated."
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")
]
Recipe = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe (quickstart).")]


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    if version:
        typer.echo(f"dgpo-cluster {importlib.metadata.version('dgpo-cluster')}")
        raise typer.Exit


@app.command()
def quickstart(
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Train the shipped tiny SD3 model to spell, on this machine: under 10 minutes on two cores."""
    train("quickstart", overrides=overrides, as_json=as_json)


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of a shipped recipe.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN_DIR", help="Go on with an interrupted or crashed run."),
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Train: a new run of a recipe, or --resume RUN_DIR to go on with one."""
    from services.train import job

    job(config=recipe, resume=resume, overrides=overrides, as_json=as_json)


@app.command()
def record(
    recipe: Recipe,
    groups: Annotated[int, typer.Option("--groups", min=1, help="Groups to sample and score.")],
    out: Annotated[Path, typer.Option("--out", help="Directory to make: the recording.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Sample and score groups with the untrained model and write them down, to be trained from later."""
    from services.record import record_groups
    from services.stop_signals import INTERRUPTED

    result = record_groups(load_config(recipe, overrides or ()), groups, out, screen)
    if as_json:
        _emit(result)
    if result["interrupted"]:
        raise typer.Exit(INTERRUPTED)


app.command("eval")(cli_eval.evaluate)
app.command("compare")(cli_eval.compare)


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Option("--out", help="Directory to make.")],
    weights: Annotated[str, typer.Option("--weights", help="ema or policy.")] = "ema",
) -> None:
    """Export the newest checkpoint for stock diffusers: a pipeline, and a LoRA where one was trained."""
    from services.exporting import export_run

    for path in export_run(run_dir, out, weights):
        screen.print(f"wrote {path}")


@app.command()
def status(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.")],
    watch: Annotated[bool, typer.Option("--watch", help="Look again every 2 seconds, until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """How a run is: state, step, queue, what every part is doing and since when, what was given up."""
    from services.run_directory import RunDirectory
    from services.status import drawn, run_status, watched

    if watch and as_json:
        raise ConfigError("--watch draws, --json prints one object: give one of them")
    run = RunDirectory.open(run_dir)
    if watch:
        watched(run, screen)
        return
    found = run_status(run)
    screen.print(drawn(found))
    if as_json:
        _emit(found.model_dump(mode="json"))


@app.command()
def scale(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.")],
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Rollout workers the run shall have.")
    ] = None,
    replicas: Annotated[
        list[str] | None,
        typer.Option("--replicas", metavar="REWARD=N", help="Replicas of a reward that the run has started."),
    ] = None,
) -> None:
    """Change the number of rollout workers or of a reward's replicas while a run goes on; nothing is lost."""
    from services.run_directory import RunDirectory
    from services.status import scale_run

    wanted = dict(map(_replicas, replicas or ()))
    if workers is None and not wanted:
        raise ConfigError("nothing to do: give --workers N, or --replicas REWARD=N")
    scale_run(RunDirectory.open(run_dir), workers, wanted)
    told = [f"{workers} workers"] if workers is not None else []
    told += [f"{count} of reward {name}" for name, count in wanted.items()]
    screen.print(f"wanted: {', '.join(told)}; dgpo status {run_dir} shows how the run is", soft_wrap=True)


def _replicas(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if not name or not count.isdecimal() or int(count) < 1:
        raise ConfigError(f"--replicas {text!r}: give REWARD=N with N from 1 on")
    return name, int(count)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write report.html of a run: one file that opens offline."""
    from services.report import build_report
    from services.run_directory import RunDirectory

    screen.print(f"wrote {build_report(RunDirectory.open(run_dir).root)}")


@app.command()
def doctor(recipe: Recipe, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check what a recipe needs (queue, rewards, model, memory, Ray) before anything is spent."""
    from services.doctor import examine, table

    findings = examine(load_config(recipe, overrides or ()))
    screen.print(table(findings))
    if as_json:
        _emit({"ok": all(f.ok for f in findings), "findings": [f.model_dump() for f in findings]})
    if not all(f.ok for f in findings):
        raise typer.Exit(1)


@app.command()
def config(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of a shipped recipe.")
    ] = None,
    overrides: Overrides = None,
    docs: Annotated[
        bool, typer.Option("--docs", help="Print the reference of all settings instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the resolved configuration of a recipe."""
    if docs:
        from services.config_docs import reference

        typer.echo(reference())
        return
    if recipe is None:
        raise ConfigError("give a recipe, or --docs for the reference of all settings")
    resolved = load_config(recipe, overrides or ())
    if as_json:
        _emit(resolved.model_dump(mode="json"))
    else:
        typer.echo(dump_config(resolved), nl=False)


@app.command()
def encode(recipe: Recipe, overrides: Overrides = None, as_json: Json = False) -> None:
    """Encode all prompts of a recipe with model.text_encoders: cached, before anything is trained."""
    from services.encoding import encode_prompts

    result = encode_prompts(load_config(recipe, overrides or ()), screen)
    screen.print(
        f"{result['prompts']} prompts, {result['encoded']} of them encoded now, "
        f"{result['bytes_a_prompt'] / 1e6:.2f} MB each, in {result['directory']}",
        highlight=False,
        soft_wrap=True,
    )
    if as_json:
        _emit(result)


@app.command()
def prompts(
    out: Annotated[Path, typer.Argument(help="JSONL file to make, for prompts.path or eval.path.")],
    test: Annotated[bool, typer.Option("--test", help="The 553 prompts of GenEval's own test.")] = False,
    count: Annotated[int, typer.Option("--count", min=1, help="Prompts to train on.")] = 50_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the prompts to train on.")] = 0,
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", help="JSONL file whose scenes are left out; default: GenEval's test."),
    ] = None,
) -> None:
    """Write GenEval prompts with their metadata: to train on (none of a held-out scene), or the test."""
    from reward_servers.geneval.prompts import (
        evaluation_records,
        read_records,
        training_records,
        write_records,
    )

    if out.suffix != ".jsonl":
        raise ConfigError(f"{out}: prompts are written as JSON lines; name a file that ends in .jsonl")
    if out.exists():
        raise ConfigError(f"{out} is there already; name a file to make")
    try:
        known = read_records(held_out) if held_out is not None else None
        records = evaluation_records() if test else training_records(count, seed, held_out=known)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    write_records(out, records)
    screen.print(f"wrote {len(records)} prompts to {out}", highlight=False, soft_wrap=True)


@bench.command("queue")
def bench_queue(as_json: Json = False) -> None:
    """Whole groups through the queue, against raw pipelined XADD/XREAD of the same bytes."""
    from benchmarks.queue import run_queue_bench

    _bench(run_queue_bench(screen), as_json)


@bench.command("weights")
def bench_weights(as_json: Json = False) -> None:
    """75 MB of LoRA tensors to 8 workers, against the bare copies."""
    from benchmarks.weights import run_weights_bench

    _bench(run_weights_bench(screen), as_json)


@bench.command("overlap")
def bench_overlap(as_json: Json = False) -> None:
    """Step time at staleness 0 and 1 with timed waits for model work."""
    from benchmarks.overlap import run_overlap_bench

    _bench(run_overlap_bench(screen), as_json)


@bench.command("memory")
def bench_memory(as_json: Json = False) -> None:
    """Peak memory of an update against group size, with the deferred group weight and without."""
    from benchmarks.memory import run_memory_bench

    _bench(run_memory_bench(screen), as_json)


@bench.command("cost")
def bench_cost(as_json: Json = False) -> None:
    """Forward passes and time of sampling and of an update, for each objective and several models."""
    from benchmarks.cost import run_cost_bench

    _bench(run_cost_bench(screen), as_json)


@bench.command("ranks")
def bench_ranks(as_json: Json = False) -> None:
    """The same updates on one, two and four ranks of this machine."""
    from benchmarks.ranks import run_ranks_bench

    _bench(run_ranks_bench(screen), as_json)


@bench.command("gpu")
def bench_gpu(
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
def bench_load(as_json: Json = False) -> None:
    """The group queue under 8, 64 and 512 simulated workers with groups of 3 MB."""
    from benchmarks.load import run_load_bench

    _bench(run_load_bench(screen), as_json)


@bench.command("soak")
def bench_soak(
    groups: Annotated[int, typer.Option(min=400, help="Trained in all.")] = 50_000, as_json: Json = False
) -> None:
    """Many groups through the real loops without any model: does memory grow?"""
    from benchmarks.soak import run_soak_bench

    _bench(run_soak_bench(screen, groups=groups), as_json)


@bench.command("chaos")
def bench_chaos(
    faults: Annotated[
        str, typer.Option("--faults", help="Names with commas between them; none: all of them.")
    ] = "",
    minutes: Annotated[float, typer.Option(help="No new run is begun behind these.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the order and the moments of the faults.")] = 0,
    runs: Annotated[
        Path | None, typer.Option(help="Folder that keeps the runs; none: a temporary one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Kill and pause parts of real runs, and hold their weights against those of an undisturbed one."""
    from benchmarks.chaos import run_chaos_bench

    names = tuple(filter(None, map(str.strip, faults.split(","))))
    result = run_chaos_bench(screen, minutes=minutes, faults=names, seed=seed, runs=runs)
    _bench(result, as_json)
    if not result["equal"] or result["lost"] or result["repeated"] or result["dead"]:
        raise typer.Exit(1)


@bench.command("compare")
def bench_compare(
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
        _emit(result)


def _emit(result: dict[str, Any]) -> None:
    typer.echo(json.dumps(result))


def main() -> None:
    """Entry point of the `dgpo` command."""
    run(app)


if __name__ == "__main__":
    main()
