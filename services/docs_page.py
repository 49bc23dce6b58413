"""What generated pages of the documentation share: types in words, cells of tables, the file."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types


def write_page(arguments: Sequence[str], module: str, page: Callable[[], str]) -> int:
    """What `python -m module FILE` does; returns its exit code."""
    if len(arguments) != 1:
        sys.stderr.write(f"usage: python -m {module} FILE\n")
        return 2
    Path(arguments[0]).write_text(page(), encoding="utf-8")
    return 0


def type_text(annotation: Any, named: Callable[[Any], str | None] = lambda kind: None) -> str:
    """A type in words.

    Args:
        named: the words for a type that the page has words of its own for.
    """

    def text(kind: Any) -> str:
        return type_text(kind, named)

    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if kind is type(None) else text(kind) for kind in arguments)
    if origin is Annotated:
        limits = [
            limit
            for part in arguments[1:]
            for item in getattr(part, "metadata", ())
            if (limit := limit_text(item))
        ]
        return ", ".join([text(arguments[0]), *limits])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {text(arguments[0])}"
        return f"{len(arguments)} x {text(arguments[0])}"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping to {text(arguments[1])}"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
    return named(annotation) or names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def limit_text(item: Any) -> str:
    """A bound of a field, `>= 0`; empty for what is none."""
    for kind, sign in (
        (annotated_types.Ge, ">="),
        (annotated_types.Gt, ">"),
        (annotated_types.Le, "<="),
        (annotated_types.Lt, "<"),
    ):
        if isinstance(item, kind):
            return f"{sign} {getattr(item, kind.__name__.lower())}"
    pattern = getattr(item, "pattern", None)
    return f"matches `{pattern}`" if pattern else ""


def cell(text: str) -> str:
    """Text that a cell of a Markdown table holds."""
    return " ".join(text.split()).replace("|", "\\|")
