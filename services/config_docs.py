"""docs/configuration.md, generated from the pydantic models: the reference cannot disagree with the code.

Promises
- Every key of every section, with its type, its range, its default and its one-line meaning.
- Deterministic: the same models give the same bytes; a test compares them with the committed page.

`make docs` writes it (`python -m services.config_docs FILE`); `dgpo config --docs` prints it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from services.config import OBJECTIVES, Config
from services.docs_page import cell, limit_text, type_text, write_page

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
    kind = type_text(field.annotation)
    limits = [text for item in field.metadata if (text := limit_text(item))]
    if limits:
        kind += ", " + ", ".join(limits)
    meaning = " ".join((field.description or "").split())
    return f"| `{name}` | {cell(kind)} | {cell(_default(field))} | {cell(meaning)} |"


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


def main(arguments: list[str]) -> int:
    """Write the page to the path given."""
    return write_page(arguments, "services.config_docs", reference)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
