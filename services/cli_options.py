"""What the commands of `dgpo` have in common: options, and where people and programs read."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

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


def emit(result: dict[str, Any]) -> None:
    """One object for programs, on standard output; `screen` is for people."""
    typer.echo(json.dumps(result))
