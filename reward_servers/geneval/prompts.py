"""GenEval's prompts, made from their specification: the 553 of the test, and any number to train on.

Promises
- `evaluation_records()` are the published test prompts with their metadata, in the order they were drawn.
- A training prompt never asks for the scene of a held-out one, however it is worded: the order of "a bowl and
  a vase" does not matter, nor whether a cup is left of a cow or the cow right of the cup.
- Training records are a pure function of (count, seed, weights, held-out records).

A record is the metadata of a prompt and its text, {tag, include, exclude?, prompt}: one line of GenEval's
`evaluation_metadata.jsonl`, and of a prompt file of this project (services/prompts.py).

Source: GenEval (arXiv 2310.11513), `prompts/create_prompts.py`; the training mixture is Flow-GRPO's (arXiv
2505.05470), which leaves out test prompts up to the order of their objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from reward_servers.geneval.classes import CLASSES
from reward_servers.geneval.task import COLOURS, RELATIONS, TAGS, Requirement, Task, parse_task

Record = dict[str, Any]

EVALUATION_SEED: Final = 43
TRAINING_WEIGHTS: Final[Mapping[str, float]] = {
    "position": 7,
    "counting": 5,
    "color_attr": 3,
    "colors": 1,
    "two_object": 1,
    "single_object": 0,
}
"""Flow-GRPO's mixture. All 80 prompts of `single_object` are in the test, so there are none to train on."""

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_LARGEST_COUNT = 4
_DRAWS_A_TAG = 100
_MAX_ATTEMPTS = 10_000
_MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_COLOURABLE = tuple(name for name in CLASSES if name != "person")


def prompt_of(task: Task) -> str:
    """The text that GenEval gives a task.

    >>> prompt_of(Task("counting", (Requirement("wine glass", 3),)))
    'a photo of three wine glasses'

    Raises:
        ValueError: a tag or a number of objects that GenEval has no text for.
    """
    first, *rest = task.include
    match task.tag, rest:
        case "single_object", []:
            told = _article(first.name)
        case "two_object", [second]:
            told = f"{_article(first.name)} and {_article(second.name)}"
        case "counting", [] if first.count < len(_NUMBERS):
            told = f"{_NUMBERS[first.count]} {_plural(first.name)}"
        case "colors", []:
            told = _coloured(first)
        case "position", [second]:
            told = f"{_article(second.name)} {second.relation} {_article(first.name)}"
        case "color_attr", [second]:
            told = f"{_coloured(first)} and {_coloured(second)}"
        case _:
            raise ValueError(f"no prompt is known for {task.tag} of {len(task.include)} objects")
    return f"a photo of {told}"


def record_of(task: Task) -> Record:
    """The metadata of a task, with its prompt."""
    record: Record = {"tag": task.tag, "include": [_clause(requirement) for requirement in task.include]}
    if task.exclude:
        record["exclude"] = [_clause(requirement) for requirement in task.exclude]
    return record | {"prompt": prompt_of(task)}


def evaluation_records(seed: int = EVALUATION_SEED) -> list[Record]:
    """The test: every class once, and the different ones among 100 draws of each other category.

    The published seed gives the 553 published prompts.
    """
    rng = np.random.default_rng(seed)
    tasks = [_single_object(index) for index in rng.choice(len(CLASSES), len(CLASSES), replace=False)]
    for tag in ("two_object", "counting", "colors", "position", "color_attr"):
        tasks += [_DRAW[tag](rng) for _ in range(_DRAWS_A_TAG)]
    return [record_of(task) for task in dict.fromkeys(tasks)]


def training_records(
    count: int,
    seed: int,
    *,
    held_out: Iterable[Mapping[str, Any]] | None = None,
    weights: Mapping[str, float] = TRAINING_WEIGHTS,
) -> list[Record]:
    """Prompts to train on. Small categories repeat: there are 240 prompts of `counting` at all.

    Args:
        held_out: records whose scenes are left out; None for the published test.
        weights: relative frequency of each tag; tags left out have none.

    Raises:
        ValueError: an unknown tag, or one of which everything is held out.
    """
    if unknown := sorted(set(weights) - set(TAGS)):
        raise ValueError(f"weights: no tag {unknown[0]!r}; valid: {', '.join(TAGS)}")
    shares = np.array([weights.get(tag, 0.0) for tag in TAGS], float)
    if not np.isfinite(shares).all() or shares.min() < 0 or shares.sum() == 0:
        raise ValueError("weights: expected numbers of at least 0, not all 0")
    records = evaluation_records() if held_out is None else held_out
    refused = {_scene(parse_task(record)) for record in records}
    rng = np.random.default_rng(seed)
    tags = rng.choice(len(TAGS), size=count, p=shares / shares.sum())
    return [record_of(_draw_outside(refused, TAGS[index], rng)) for index in tags]


def read_records(path: Path) -> list[Record]:
    """Records of a JSONL file.

    Raises:
        ValueError: no such file, or a line that is no record, with its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
                raise ValueError("expected a JSON object with a 'prompt' text")
            parse_task(record, classes=CLASSES, colours=COLOURS)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        records.append(record)
    return records


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Records as JSONL: a file for `prompts.path` of a run."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _draw_outside(refused: set[object], tag: str, rng: np.random.Generator) -> Task:
    for _ in range(_MAX_ATTEMPTS):
        task = _DRAW[tag](rng)
        if _scene(task) not in refused:
            return task
    raise ValueError(f"{tag}: every prompt seems to be held out; give it the weight 0")


def _scene(task: Task) -> object:
    """The same for two tasks that ask for the same picture."""
    last = task.include[-1]
    if task.tag == "position" and len(task.include) == 2 and last.relation is not None:
        first = task.include[0]
        told = (last.name, last.relation, first.name)
        return min(told, (first.name, _MIRRORED[last.relation], last.name))
    return task.tag, frozenset((r.name, r.count, r.colour) for r in task.include)


def _single_object(index: int) -> Task:
    return Task("single_object", (Requirement(CLASSES[index], 1),))


def _two_object(rng: np.random.Generator) -> Task:
    first, second = rng.choice(len(CLASSES), size=2, replace=False)
    return Task("two_object", (Requirement(CLASSES[first], 1), Requirement(CLASSES[second], 1)))


def _counting(rng: np.random.Generator) -> Task:
    name = CLASSES[rng.choice(len(CLASSES))]
    count = int(rng.integers(2, _LARGEST_COUNT, endpoint=True))
    return Task("counting", (Requirement(name, count),), (Requirement(name, count + 1),))


def _colors(rng: np.random.Generator) -> Task:
    name = _COLOURABLE[rng.choice(len(_COLOURABLE))]
    return Task("colors", (Requirement(name, 1, COLOURS[rng.choice(len(COLOURS))]),))


def _position(rng: np.random.Generator) -> Task:
    subject, target = rng.choice(len(CLASSES), size=2, replace=False)
    relation = RELATIONS[rng.choice(len(RELATIONS))]
    placed = Requirement(CLASSES[subject], 1, relation=relation, target=0)
    return Task("position", (Requirement(CLASSES[target], 1), placed))


def _color_attr(rng: np.random.Generator) -> Task:
    names = rng.choice(len(_COLOURABLE), size=2, replace=False)
    colours = rng.choice(len(COLOURS), size=2, replace=False)
    first, second = (
        Requirement(_COLOURABLE[name], 1, COLOURS[colour])
        for name, colour in zip(names, colours, strict=True)
    )
    return Task("color_attr", (first, second))


_DRAW: Final[Mapping[str, Callable[[np.random.Generator], Task]]] = {
    "single_object": lambda rng: _single_object(rng.choice(len(CLASSES))),
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}


def _clause(requirement: Requirement) -> Record:
    clause: Record = {"class": requirement.name, "count": requirement.count}
    if requirement.colour is not None:
        clause["color"] = requirement.colour
    if requirement.relation is not None:
        clause["position"] = [requirement.relation, requirement.target]
    return clause


def _coloured(requirement: Requirement) -> str:
    return f"{_article(requirement.colour or '')} {requirement.name}"


def _article(name: str) -> str:
    return f"an {name}" if name[:1] in tuple("aeiou") else f"a {name}"


def _plural(name: str) -> str:
    # As GenEval has it: "knifes", "sandwichs", "skises".
    return f"{name}es" if name.endswith("s") else f"{name}s"
