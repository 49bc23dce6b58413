"""What a scorer is. Adding a reward is adding one file to scorers/ with a `create` function.

A scorer states what it needs from its callers and nothing about HTTP, Serve or batching policy:
`ScoringEngine` calls it from one thread, with at most `max_batch` images.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from reward_servers.protocol import Metadata
from reward_servers.wire import ScoreCall


class ScorerOptions(BaseModel):
    """Base of a scorer's arguments: closed, so that a misspelt one is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        unknown = [name for name in given if name not in cls.model_fields] if isinstance(given, dict) else []
        if unknown:
            valid = ", ".join(cls.model_fields) or "none"
            raise ValueError(f"no such argument: {', '.join(map(str, unknown))}; valid: {valid}")
        return given

    neutral: ClassVar[frozenset[str]] = frozenset()
    """Arguments that change no score, or only its last bits."""

    def digest(self) -> str:
        """Of the arguments that are not neutral and not at their default; empty where there is none.

        A default that changes is a new `version` of the scorer.
        """
        told = self.model_dump(mode="json", exclude=set(self.neutral), exclude_defaults=True)
        if not told:
            return ""
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class ItemScore:
    """The score of one image, or why there is none. A score that is not finite becomes an error."""

    score: float | None
    details: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class Scorer(ABC):
    """One reward. Not thread-safe unless it says so."""

    name: ClassVar[str]
    """The name of its file in scorers/."""
    version: ClassVar[str]
    """Of formula, preprocessing and defaults; grows when a score may change."""
    batch_invariant: ClassVar[bool]
    """An image gets the same score, to the bit, whatever it is scored with."""
    max_batch: int
    """Images that `score` takes at once."""
    model: str
    """The weights it scores with."""
    options: ScorerOptions = ScorerOptions()
    """Its arguments; whoever takes some keeps them here."""
    threaded: ClassVar[bool] = False
    """Whether it uses the CPU threads that it is given; otherwise more than one is refused."""

    @property
    def full_version(self) -> str:
        """`version` and the digest of the arguments: scores of one model and full version are comparable."""
        digest = self.options.digest()
        return f"{self.version}-{digest}" if digest else self.version

    def check(self, prompt: str, metadata: Metadata) -> str | None:
        """Why this prompt and metadata can never be scored, or None. Refused before any work, with 422."""
        return None

    @abstractmethod
    def score(self, call: ScoreCall) -> Sequence[ItemScore]:
        """One ItemScore an image, in order. Raising fails the whole call."""

    @abstractmethod
    def warm_up(self) -> None:
        """Run once on something small, so that the first request is as fast as the next."""
