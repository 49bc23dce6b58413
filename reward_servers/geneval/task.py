"""What a prompt of GenEval asks for, read from its metadata.

Promises
- Metadata that cannot be judged is refused, and never judged as something else: a misspelt key of a clause, a
  misspelt tag, or a count of 0 is an error that names its place.

Format: djghosh13/geneval, `prompts/evaluation_metadata.jsonl`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

TAGS: Final = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's categories."""
COLOURS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""GenEval's colours."""
RELATIONS: Final = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Requirement:
    """Objects of one class that a prompt asks for."""

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None
    """One of RELATIONS, to the objects of `target`."""
    target: int | None = None
    """Index of an earlier requirement."""


@dataclass(frozen=True)
class Task:
    """What a prompt asks for."""

    tag: str
    include: tuple[Requirement, ...]
    exclude: tuple[Requirement, ...] = ()
    """Fails where that many are found; read by the official rule only."""


def parse_task(
    metadata: Mapping[str, Any],
    *,
    tags: Collection[str] = TAGS,
    classes: Collection[str] | None = None,
    colours: Collection[str] | None = None,
) -> Task:
    """The task in the metadata of a prompt.

    Args:
        metadata: {tag, include: [{class, count, color?, position?: [relation, index]}], exclude?: [{class,
            count}]}. Other keys are left to other rewards; inside a clause they are refused.
        tags: that may occur. The tag chooses the threshold of detections, so a misspelt one is refused.
        classes: that may occur; None for any.
        colours: that may occur; None for any.

    Raises:
        ValueError: with the place and what would be valid.

    >>> parse_task({"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]}).include
    (Requirement(name='cup', count=1, colour='red', relation=None, target=None),)
    """
    tag = metadata.get("tag")
    if not isinstance(tag, str) or tag not in tags:
        raise ValueError(f"tag: expected one of {', '.join(tags)}; found {tag!r:.60}")
    parse = _ClauseParser(classes, colours)
    include = parse.all("include", metadata.get("include"))
    if not include:
        raise ValueError("include: expected at least one object")
    return Task(tag, include, parse.all("exclude", metadata.get("exclude", [])))


@dataclass(frozen=True)
class _ClauseParser:
    classes: Collection[str] | None
    colours: Collection[str] | None

    def all(self, place: str, clauses: Any) -> tuple[Requirement, ...]:
        if not isinstance(clauses, list | tuple):
            raise ValueError(f"{place}: expected a list of objects; found {clauses!r:.60}")
        return tuple(self.one(f"{place}[{index}]", clause, index) for index, clause in enumerate(clauses))

    def one(self, place: str, clause: Any, index: int) -> Requirement:
        if not isinstance(clause, Mapping):
            raise ValueError(f"{place}: expected an object with class and count; found {clause!r:.60}")
        valid = ("class", "count", "color", "position") if place.startswith("include") else ("class", "count")
        if unknown := sorted(str(key) for key in clause if key not in valid):
            raise ValueError(f"{place}: unknown key {unknown[0]!r:.60}; valid: {', '.join(valid)}")
        name, count, colour = clause.get("class"), clause.get("count"), clause.get("color")
        if not isinstance(name, str) or not name or (self.classes is not None and name not in self.classes):
            raise ValueError(f"{place}.class: {name!r:.60} is no class that is looked for")
        if type(count) is not int or count < 1:
            raise ValueError(f"{place}.count: expected a whole number of at least 1; found {count!r:.60}")
        if "color" in clause and (
            not isinstance(colour, str) or (self.colours is not None and colour not in self.colours)
        ):
            valid_colours = "a text" if self.colours is None else f"one of {', '.join(self.colours)}"
            raise ValueError(f"{place}.color: expected {valid_colours}; found {colour!r:.60}")
        if "position" not in clause:
            return Requirement(name, count, colour)
        return Requirement(name, count, colour, *_position(place, clause["position"], index))


def _position(place: str, position: Any, index: int) -> tuple[str, int]:
    if not isinstance(position, list | tuple) or len(position) != 2:
        raise ValueError(f"{place}.position: expected [relation, index]; found {position!r:.60}")
    relation, target = position
    if relation not in RELATIONS:
        raise ValueError(f"{place}.position: expected one of {', '.join(RELATIONS)}; found {relation!r:.60}")
    if type(target) is not int or not 0 <= target < index:
        raise ValueError(f"{place}.position: expected the index of an earlier object; found {target!r:.60}")
    return relation, target
