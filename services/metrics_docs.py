"""docs/metrics.md, generated from what writes the metrics: the reference cannot disagree with the code.

Promises
- Every field of every row of `metrics.jsonl`, every TensorBoard name and every metric of Prometheus; what
  each means is its docstring, or its text in services/ray_metrics.py.
- Deterministic: the same code gives the same bytes; a test compares them with the committed page.

`make docs` writes it (`python -m services.metrics_docs FILE`).
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, Final, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from services.docs_page import cell, type_text, write_page
from services.metrics import Estimate, EvalRow, EventRow, MemoryRow, Row, Spread, UpdateRow
from services.ray_metrics import reference as prometheus
from services.scalars import scalars

ROWS: Final[tuple[type[Row], ...]] = (UpdateRow, EvalRow, EventRow, MemoryRow)
PARTS: Final[tuple[type[BaseModel], ...]] = (Spread, Estimate)
"""What fields of rows consist of."""

_HEAD = """\
# Metrics

What a run says of itself, and where: [watching a run](watching.md) shows how to look at it.

_This page is generated from `services/metrics.py`, `services/scalars.py` and
`services/ray_metrics.py` by `make docs`; change it there._

## `metrics.jsonl`

One JSON object a line, in the run directory, with a `kind` that tells the rows below apart. Lines are only
added: after a resume, rows of an earlier `epoch` from the first step of a later one on are of updates that
were undone.
"""

_TENSORBOARD = """
## TensorBoard

`tensorboard --logdir RUN_DIR/tensorboard`. Names in capitals stand for what a mapping holds: a reward, a
phase, a part of one, a measure. Values that are null are left out.

| name | field | of |
| --- | --- | --- |
"""

_PROMETHEUS = """
## Prometheus

From Ray's own metrics, while the run goes on. Prometheus puts `ray_` before each name and adds `_total` to
counters; every series has the label `run` too.

"""


def reference() -> str:
    """The page, Markdown."""
    parts = [_HEAD]
    for row in ROWS:
        kind = row.model_fields["kind"].default
        parts.append(f"\n### `{kind}`\n\n{_table(row)}")
    for part in PARTS:
        parts.append(f"\n### {_title(part)}\n\n{_table(part)}")
    parts.append(_TENSORBOARD + "\n".join(_tensorboard()) + "\n")
    parts.append(_PROMETHEUS + prometheus())
    return "".join(parts)


def _title(part: type[BaseModel]) -> str:
    return f"The {part.__name__.lower()} of a reward"


def _table(model: type[BaseModel]) -> str:
    lines = [cell(inspect.getdoc(model) or ""), "", "| field | type | what it says |", "| --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if name != "kind":
            lines.append(
                f"| `{name}` | {type_text(field.annotation, _linked)} | {cell(field.description or '')} |"
            )
    return "\n".join(lines) + "\n"


def _linked(kind: Any) -> str | None:
    return f"[{kind.__name__.lower()}](#{_title(kind).lower().replace(' ', '-')})" if kind in PARTS else None


def _tensorboard() -> list[str]:
    """A line for each name, as rows have them whose mappings hold a placeholder.

    Every number of such a row is another one, so that a value tells which field it is.
    """
    lines = []
    for model, common in (
        (UpdateRow, {"step": 0, "max_steps": 1, "seconds": 0.0, "reward_mean": 0.0, "reward_std": 0.0}),
        (EvalRow, {"step": 0, "prompts": 0}),
    ):
        values: dict[str, Any] = {"time": 0.0, "epoch": 0, **common}
        places: dict[float, str] = {}
        for name, field in model.model_fields.items():
            value, found = _marked(name, field, len(places) + 1)
            if found:
                values[name] = value
                places |= found
        for tag, value in scalars(model.model_validate(values)).items():
            lines.append(
                f"| `{tag}` | {places[float(value or 0)]} | `{model.model_fields['kind'].default}` |"
            )
    return lines


def _marked(name: str, field: FieldInfo, number: int) -> tuple[Any, dict[float, str]]:
    """A value for a field with numbers of its own, and which place in the field each number is at."""
    kind = field.annotation
    if get_origin(kind) is dict:
        inner = get_args(kind)[1]
        key = {"phases": "PHASE", "update": "PART", "rollout": "PHASE", "diversity": "MEASURE"}.get(
            name, "REWARD"
        )
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            numbers = {part: float(number + at) for at, part in enumerate(inner.model_fields)}
            return {key: numbers}, {value: f"`{name}.{key}.{part}`" for part, value in numbers.items()}
        return {key: number}, {float(number): f"`{name}.{key}`"}
    if name in ("time", "kind", "epoch", "when", "ordinals", "staleness"):
        return None, {}
    return number, {float(number): f"`{name}`"}


def main(arguments: list[str]) -> int:
    """Write the page to the path given."""
    return write_page(arguments, "services.metrics_docs", reference)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
