"""docs/configuration.md, generated from the pydantic models: the reference cannot disagree with the code.

Promises
- Every key of every section, with its type, its range, its default and its one-line meaning.
- Deterministic: the same models give the same bytes; a test compares them with the committed page.

`make docs` writes it (`python -m services.config_docs FILE`); `dgpo config --docs` prints it.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from services.config import OBJECTIVES, Config

_HEAD = """\
# Configuration

One YAML file a run; `recipes/` has examples. `dgpo config RECIPE` prints the resolved configuration. Any key
is set on the command line with `--set section.key=value`: the value is YAML, and items of a list go by index
(`--set rewards.0.weight=2`). A recipe may begin with `extends: OTHER` (a recipe's name or a YAML file) and
say only what differs: sections are merged key by key; lists are replaced, and so is an `objective` of another
name. Unknown keys, wrong types and impossible combinations are refused, with the path in the YAML and what
would be valid.

<!-- runnable -->
```
dgpo config quickstart --set learner.max_steps=10 --set rewards.0.weight=2
dgpo config --docs                                                          # this page
```

_This page is generated from `services/config/` by `make docs`; change it there._
"""


def reference() -> str:
    """The page, Markdown."""
    parts = [_HEAD]
    for path, model, note in _sections(Config, ""):
        if not path:
            continue
        lines = [f"\n## `{path}`\n"]
        if note:
            lines.append(f"{note}\n")
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [_row(name, field) for name, field in model.model_fields.items() if _section(field) is None]
        parts.append("\n".join(lines) + "\n")
    return "".join(parts)


def _sections(
    model: type[BaseModel], path: str, note: str = ""
) -> Iterator[tuple[str, type[BaseModel], str]]:
    yield path, model, note
    for name, field in model.model_fields.items():
        if name == "objective":
            for tag, kind in OBJECTIVES.items():
                said = f"Where `name` is `{tag}`. {inspect.getdoc(kind)}"
                yield from _sections(kind, "objective", said)
            continue
        inner = _section(field)
        if inner is None:
            continue
        is_list = get_origin(field.annotation) is tuple
        place = f"{path}.{name}" if path else name
        said = (inner.__doc__ or "").strip() if "__doc__" in inner.__dict__ else ""
        yield from _sections(
            inner, f"{place}[]" if is_list else place, "A list, one entry each." if is_list else said
        )


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section, or a list of sections."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _row(name: str, field: FieldInfo) -> str:
    kind = _type(field.annotation)
    limits = [text for item in field.metadata if (text := _limit(item))]
    if limits:
        kind += ", " + ", ".join(limits)
    meaning = " ".join((field.description or "").split())
    return f"| `{name}` | {_cell(kind)} | {_cell(_default(field))} | {_cell(meaning)} |"


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if kind is type(None) else _type(kind) for kind in arguments)
    if origin is Annotated:
        limits = [text for part in arguments[1:] for item in part.metadata if (text := _limit(item))]
        return ", ".join([_type(arguments[0]), *limits])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_type(arguments[0])}"
        return f"{len(arguments)} x {_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _limit(item: Any) -> str:
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


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined or value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(str(item) for item in value)}]`"
    return f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(arguments: list[str]) -> int:
    """Write the page to the path given."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m services.config_docs FILE\n")
        return 2
    Path(arguments[0]).write_text(reference(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
