"""`dgpo`: everything a user does, from here.

Promises
- Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted after a clean checkpoint.
- With --json the last line of standard output is one JSON object; what is for people goes to standard error.
- Nothing heavy is imported before it is needed: `dgpo --help` answers at once.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Annotated

import typer

from services import cli_eval, cli_plan, cli_ui
from services.cli_bench import bench
from services.cli_options import Json, Overrides, Recipe, emit, screen
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
app.add_typer(bench, name="bench")
app.add_typer(reward, name="reward")


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
        emit(result)
    if result["interrupted"]:
        raise typer.Exit(INTERRUPTED)


app.command("eval")(cli_eval.evaluate)
app.command("compare")(cli_eval.compare)
app.command("ui")(cli_ui.ui)
app.command("plan")(cli_plan.plan)


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Option("--out", help="Directory to make.")],
    weights: Annotated[str, typer.Option("--weights", help="ema or policy.")] = "ema",
    only: Annotated[
        str | None,
        typer.Option(
            "--only", metavar="PART", help="pipeline or lora; default: both, where a LoRA was trained."
        ),
    ] = None,
) -> None:
    """Export the newest checkpoint for stock diffusers: a pipeline, and a LoRA where one was trained."""
    from services.exporting import export_run, exported_part

    for path in export_run(run_dir, out, weights, exported_part(only)):
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
        emit(found.model_dump(mode="json"))


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
        emit({"ok": all(f.ok for f in findings), "findings": [f.model_dump() for f in findings]})
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
        emit(resolved.model_dump(mode="json"))
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
        emit(result)


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


def main() -> None:
    """Entry point of the `dgpo` command."""
    run(app)


if __name__ == "__main__":
    main()
