"""The text-rendering reward of Flow-GRPO and DGPO, for any OCR engine.

    target = the text between the first pair of double quotes of the prompt
    d      = 0 if the target is contained in the recognised text, else their Levenshtein distance,
             capped at the length of the target
    reward = 1 - d / len(target)

Spaces are removed and letters lowered on both sides. That is the rule `contained`, the published one. It
ignores extra text, so it can be gamed by writing more; the rule `exact` is the same without the exception for
contained targets, so that every extra character costs. `exact` of the details is 1 where nothing differs.

Source: Flow-GRPO (arXiv 2505.05470), `flow_grpo/ocr.py`; DGPO (arXiv 2510.08425) uses the same.
"""

from __future__ import annotations

import re
from typing import Literal

from rapidfuzz.distance import Levenshtein

from reward_servers.scorer import ItemScore

Match = Literal["contained", "exact"]
"""Which rule scores a recognised text: the published one, or the one that counts extra text."""

_QUOTED = re.compile(r'"([^"]*)"')


def target_of(prompt: str) -> str | None:
    """What the prompt asks to be written, normalised; None where it asks for nothing.

    >>> target_of('a sign that says "K7 QX"')
    'k7qx'
    >>> target_of("a sign") is None
    True
    """
    match = _QUOTED.search(prompt)
    return normalised(match.group(1)) or None if match else None


def normalised(text: str) -> str:
    """Without white space, lower case."""
    return "".join(text.split()).lower()


def accuracy(text: str, target: str, match: Match = "contained") -> float:
    """The reward of a recognised text, both normalised, in [0, 1].

    >>> accuracy("k7qx", "k7qx"), accuracy("xxk7qxxx", "k7qx"), accuracy("k7q", "k7qx"), accuracy("", "k7qx")
    (1.0, 1.0, 0.75, 0.0)
    >>> accuracy("k7qx", "k7qx", "exact"), accuracy("xk7qxx", "k7qx", "exact")
    (1.0, 0.5)
    """
    if match == "contained" and target in text:
        return 1.0
    return 1.0 - min(Levenshtein.distance(text, target), len(target)) / len(target)


def score_text(text: str, prompt: str, match: Match = "contained") -> ItemScore:
    """The reward of a recognised text for a prompt; details {text, exact}."""
    target = target_of(prompt)
    if target is None:
        return ItemScore(None, error=missing_target(prompt))
    read = normalised(text)
    return ItemScore(accuracy(read, target, match), {"text": text, "exact": int(read == target)})


def missing_target(prompt: str) -> str | None:
    """Why a prompt has no text to look for, or None."""
    if target_of(prompt) is not None:
        return None
    return f"prompt {prompt!r:.120} has no text between double quotes, so there is nothing to read"
