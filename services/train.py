"""A whole training with its results: what `dgpo train` runs, and `python -m services.train` in a Ray job.

Promises
- Writes metrics, samples, checkpoints, the exported model and report.html into the run directory, and returns
  the result as one flat object.
- An interrupted run gets its report too, and says how to go on.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from services.config import Config
from services.config_file import load_config
from services.exit_codes import FAILED, run
from services.preflight import refuse_unusable
from services.run_directory import RunDirectory
from services.stop_signals import INTERRUPTED

logger = logging.getLogger(__name__)


def run_training(config: Config, directory: RunDirectory, *, resume: bool, screen: Console) -> dict[str, Any]:
    """Train, export, report.

    Args:
        config: of the run.
        directory: of the run, made before.
        resume: go on from its newest checkpoint.
        screen: where people look.

    Returns:
        services/results.py `summary`.
    """
    with screen.status("loading"):
        from services.driver import train
        from services.exporting import export_into
        from services.progress import Progress
        from services.results import closing_table, summary

    heldout = [reward.name for reward in config.rewards if reward.heldout]
    progress = Progress(
        directory.name,
        config.learner.max_steps,
        heldout=heldout,
        max_staleness=config.queue.max_staleness,
        console=screen,
    )
    with progress:
        outcome = train(config, directory, progress, resume=resume)
        if not outcome.interrupted:
            progress.activity("exporting the model")
            export_into(directory)
        progress.activity("writing the report")
        page = _report(directory)
    result = summary(config, outcome)
    screen.print(closing_table(config, result))
    screen.print(page, highlight=False, soft_wrap=True, markup=False)
    if not outcome.interrupted:
        screen.print(_next_steps(directory), highlight=False, soft_wrap=True, markup=False)
    else:
        why = f"stopped by the guard: {outcome.guard}\n" if outcome.guard else ""
        anyway = " --set guard.action=mark" if outcome.guard else ""
        screen.print(
            f"{why}stopped after step {outcome.version.step} with a checkpoint; go on with\n"
            f"  dgpo train --resume {directory.root}{anyway}",
            highlight=False,
            soft_wrap=True,
        )
    return result


def _next_steps(directory: RunDirectory) -> str:
    pipeline = directory.root / "export" / "pipeline"
    return (
        f"model:  {pipeline} (for stock diffusers; its README.md shows how)\n"
        f"train longer:  dgpo train --resume {directory.root} --set learner.max_steps=N\n"
        f"score again:   dgpo eval {directory.root}"
    )


def _report(directory: RunDirectory) -> str:
    """Where the report is, or why there is none: a page that cannot be drawn must not fail a trained run."""
    from services.report import build_report

    try:
        return f"report: {build_report(directory.root)}"
    except Exception as error:
        logger.exception("the report was not written")
        return f"report: not written ({type(error).__name__}: {error}); try dgpo report {directory.root}"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def job(
    config: Annotated[str | None, typer.Option(help="A YAML file, or the name of a shipped recipe.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN_DIR", help="Go on with a run.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="May be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Train a recipe (--config), or go on with a run (--resume)."""
    if (config is None) == (resume is None):
        raise typer.BadParameter("give either a configuration or --resume RUN_DIR")
    screen = Console(stderr=True)
    directory = RunDirectory.open(resume) if resume is not None else None
    changes = tuple(overrides or ())
    settings = directory.config(changes) if directory is not None else load_config(str(config), changes)
    with screen.status("checking the recipe"):
        refuse_unusable(settings)
    directory = directory or RunDirectory.create(settings)
    result = run_training(settings, directory, resume=resume is not None, screen=screen)
    if as_json:
        typer.echo(json.dumps(result))
    if result["guard"]:
        raise typer.Exit(FAILED)
    if result["interrupted"]:
        raise typer.Exit(INTERRUPTED)


if __name__ == "__main__":
    run(app)
