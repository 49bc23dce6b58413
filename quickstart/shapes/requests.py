"""Prompts of the shapes task: requests for coloured shapes, in words and in GenEval's format.

Promises
- A request of the training law contains no held-out combination (combinations.py), one of the held-out law at
  least one: the two never share a prompt, whatever the seeds.
- `training_request` follows from its random state, `heldout_requests` from its seed; fewer held-out requests
  begin the list of more.
- `heldout_requests` goes through the six categories in turn. Where a category has no more distinct held-out
  prompts it begins again: of single objects there are 2, of two objects 16, of colours 16.
- Only names and the standard library's random numbers: no global random state.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from quickstart.shapes.combinations import (
    NUMBERS,
    alone_is_heldout,
    colour_is_heldout,
    companion_is_heldout,
    number_is_heldout,
)
from reward_servers.geneval.task import RELATIONS, TAGS
from reward_servers.shapes.outlines import COLOURS, SHAPES

TEMPLATE: Final = "a photo of"
NUMBER_WORDS: Final = {2: "two", 3: "three", 4: "four"}
TRAINING_SHARES: Final = {
    "single_object": 1,
    "two_object": 3,
    "counting": 4,
    "colors": 2,
    "position": 5,
    "color_attr": 5,
}
"""How often a category is asked for in training, as ratios: the hard ones more often."""


_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Request:
    """What a prompt asks for.

    >>> Request("counting", ("cross",), number=3).prompt
    'a photo of three crosses'
    >>> Request("position", ("star", "circle"), relation="left of").prompt
    'a photo of a star left of a circle'
    >>> Request("color_attr", ("star", "circle"), ("blue", "orange")).prompt
    'a photo of a blue star and an orange circle'
    """

    tag: str
    """GenEval's category."""
    shapes: tuple[str, ...]
    """One, or two different ones; in a relation the first one stands `relation` the second."""
    colours: tuple[str, ...] | None = None
    """As many as shapes, different ones, or untold, as where shapes are counted or stand in a relation."""
    number: int = 1
    """How many of a single shape."""
    relation: str | None = None

    @property
    def prompt(self) -> str:
        """The request in words."""
        if self.number > 1:
            return f"{TEMPLATE} {NUMBER_WORDS[self.number]} {_plural(self.shapes[0])}"
        named = [_one(shape, colour) for shape, colour in self._coloured()]
        between = f" {self.relation or 'and'} "
        return f"{TEMPLATE} {between.join(named)}"

    @property
    def metadata(self) -> dict[str, Any]:
        """The request in GenEval's format: {tag, include, exclude?}."""
        include: list[dict[str, Any]] = [
            {"class": shape, "count": self.number} | ({"color": colour} if colour is not None else {})
            for shape, colour in self._coloured()
        ]
        if self.relation is not None:
            # GenEval names the target first.
            include.reverse()
            include[1]["position"] = [self.relation, 0]
        told: dict[str, Any] = {"tag": self.tag, "include": include}
        if self.number > 1:
            told["exclude"] = [{"class": self.shapes[0], "count": self.number + 1}]
        return told

    @property
    def is_heldout(self) -> bool:
        """Whether any of its combinations is held out."""
        if any(colour is not None and colour_is_heldout(shape, colour) for shape, colour in self._coloured()):
            return True
        if len(self.shapes) == 2:
            return companion_is_heldout(*self.shapes)
        if self.number > 1:
            return number_is_heldout(self.shapes[0], self.number)
        return self.colours is None and alone_is_heldout(self.shapes[0])

    def _coloured(self) -> list[tuple[str, str | None]]:
        return list(zip(self.shapes, self.colours or (None,) * len(self.shapes), strict=True))


def training_request(rng: random.Random) -> Request:
    """A request without held-out combinations, categories by `TRAINING_SHARES`."""
    (tag,) = rng.choices(TAGS, [TRAINING_SHARES[tag] for tag in TAGS])
    while (request := any_request(tag, rng)).is_heldout:
        pass
    return request


def heldout_requests(count: int, seed: int) -> list[Request]:
    """`count` requests with a held-out combination each, the categories in turn."""
    rng = random.Random(f"shapes/{seed}/heldout")
    seen = {tag: dict[Request, int]() for tag in TAGS}
    requests: list[Request] = []
    for place in range(count):
        tag = TAGS[place % len(TAGS)]
        requests.append(_rarest(tag, seen[tag], rng))
    return requests


def with_article(word: str) -> str:
    """A shape or colour with "a" or "an" before it."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def mistaken(request: Request, share: float, rng: random.Random) -> Request:
    """`request` with each of its words for a shape, colour, number or relation replaced by another one with
    probability `share`; without held-out combinations.

    Raises:
        ValueError: `request` has one itself.
    """
    if request.is_heldout:
        raise ValueError(f"{request.prompt!r} is held out")
    # What is wrong is settled first: were it drawn again too, mistakes would be rarer than `share`.
    wrong_shapes = [rng.random() < share for _ in request.shapes]
    wrong_colours = [rng.random() < share for _ in request.colours or ()]
    wrong_number = request.number > 1 and rng.random() < share
    wrong_relation = request.relation is not None and rng.random() < share
    while True:
        changed = replace(
            request,
            shapes=_changed(request.shapes, wrong_shapes, SHAPES, rng),
            colours=request.colours and _changed(request.colours, wrong_colours, COLOURS, rng),
            number=_other(request.number, NUMBERS, rng) if wrong_number else request.number,
            relation=_other(request.relation, RELATIONS, rng) if wrong_relation else request.relation,
        )
        if _is_sound(changed) and not changed.is_heldout:
            return changed


def any_request(tag: str, rng: random.Random) -> Request:
    """A request of a category, held out or not."""
    shapes = tuple(rng.sample(SHAPES, 2 if tag in ("two_object", "position", "color_attr") else 1))
    return Request(
        tag,
        shapes,
        colours=tuple(rng.sample(COLOURS, len(shapes))) if tag in ("colors", "color_attr") else None,
        number=rng.choice(NUMBERS) if tag == "counting" else 1,
        relation=rng.choice(RELATIONS) if tag == "position" else None,
    )


_TRIES: Final = 200
"""Draws of a held-out request before one that was had already is taken again."""


def _rarest(tag: str, seen: dict[Request, int], rng: random.Random) -> Request:
    """A held-out request that was drawn no more often than the others."""
    best: Request | None = None
    for _ in range(_TRIES):
        request = any_request(tag, rng)
        if request.is_heldout and (best is None or seen.get(request, 0) < seen.get(best, 0)):
            best = request
            if request not in seen:
                break
    assert best is not None, f"no held-out request of {tag} in {_TRIES} draws"
    seen[best] = seen.get(best, 0) + 1
    return best


def _other(value: _Value, values: Sequence[_Value], rng: random.Random) -> _Value:
    return rng.choice([v for v in values if v != value])


def _changed(
    words: Sequence[str], wrong: Sequence[bool], values: Sequence[str], rng: random.Random
) -> tuple[str, ...]:
    return tuple(_other(w, values, rng) if bad else w for w, bad in zip(words, wrong, strict=True))


def _is_sound(request: Request) -> bool:
    """Whether shapes and colours differ."""
    told = (request.shapes, request.colours or ())
    return all(len(set(words)) == len(words) for words in told)


def _one(shape: str, colour: str | None) -> str:
    return f"{with_article(colour)} {shape}" if colour else with_article(shape)


def _plural(shape: str) -> str:
    """The word for several.

    >>> _plural("cross"), _plural("ring")
    ('crosses', 'rings')
    """
    return shape + ("es" if shape.endswith("s") else "s")
