"""The folder of an evaluation: what it depends on, and every shard that is finished.

Layout
    evaluation.json        EvaluationSettings
    scorers.json           reward -> model and version of the server that scored
    shards/00000.json      the samples of SHARD_PROMPTS prompts, written when all of them are scored
    sheets/00000.png       their images with captions
    images/00012-0.png     each image, where asked for
    summary.json           means and standard errors

Promises
- A shard is whole or it is not there; what is there is never sampled again.
- A folder belongs to one evaluation: going on with other settings or another scorer is refused, with every
  difference named. Two processes at once are refused too.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from services.config_file import ConfigError
from services.messages import Message
from services.suites.settings import EvaluationSettings
from services.whole_file import write_whole

UNKNOWN: Final = "unknown"
"""What scores, where its server did not say."""


class Sample(Message):
    """One image of an evaluation."""

    place: int
    """Of the prompt in the suite."""
    sample: int
    seed: int
    prompt: str
    tag: str | None
    scores: dict[str, float]
    """By measure: a reward's name, or NAME.exact for the rate of exact matches of scorers that tell."""
    details: dict[str, dict[str, Any]]
    """Reward -> what its scorer said."""


class EvaluationFolder:
    """One evaluation on the disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def prepare(cls, root: Path, settings: EvaluationSettings) -> EvaluationFolder:
        """A new folder, or one that the same evaluation has begun.

        Raises:
            ConfigError: it holds something else, or an evaluation with other settings.
        """
        folder = cls(root)
        if (
            root.exists()
            and not folder._settings_file.is_file()
            and (not root.is_dir() or any(root.iterdir()))
        ):
            raise ConfigError(f"--out {root}: exists and holds no evaluation; give a new folder")
        for part in ("shards", "sheets"):
            (root / part).mkdir(parents=True, exist_ok=True)
        if not folder._settings_file.is_file():
            write_whole(folder._settings_file, settings.model_dump_json(indent=2))
            return folder
        changed = list(settings.differences(folder.settings()))
        if changed:
            raise ConfigError(
                f"--out {root}: holds an evaluation with other settings; give another folder, or leave these "
                "as they are there\n" + "\n".join(f"  {line}" for line in changed)
            )
        return folder

    @classmethod
    def open(cls, root: Path) -> EvaluationFolder:
        """A folder to read.

        Raises:
            ConfigError: it is no evaluation.
        """
        folder = cls(root)
        folder.settings()
        return folder

    def settings(self) -> EvaluationSettings:
        try:
            return EvaluationSettings.model_validate_json(self._settings_file.read_text())
        except (OSError, ValidationError) as error:
            raise ConfigError(
                f"{self.root}: no evaluation of a suite (dgpo eval MODEL --suite ... --out): {error}"
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one process.

        Raises:
            ConfigError: another one holds it.
        """
        with (self.root / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"--out {self.root}: another process is evaluating into it") from None
            yield

    def check_scorers(self, told: Mapping[str, str]) -> None:
        """Remember what scores, by reward; what is `UNKNOWN` may be told later.

        Raises:
            ConfigError: the finished shards were scored by other models or versions.
        """
        file = self.root / "scorers.json"
        finished = any((self.root / "shards").glob("[0-9]*.json"))
        before = json.loads(file.read_text()) if finished and file.is_file() else {}
        known = {name: scorer for name, scorer in before.items() if scorer != UNKNOWN}
        changed = [
            f"  {name}: {told[name]!r}; there {known[name]!r}"
            for name in told
            if name in known and told[name] not in (known[name], UNKNOWN)
        ]
        if changed:
            raise ConfigError(
                f"--out {self.root}: its finished shards were scored by other scorers; give another folder\n"
                + "\n".join(changed)
            )
        write_whole(file, json.dumps({**told, **known}, indent=2))

    def missing(self) -> list[int]:
        """The shards that are not finished."""
        settings = self.settings()
        count = -(-settings.prompts // settings.shard_prompts)
        return [number for number in range(count) if not self._shard(number).is_file()]

    def write_shard(self, number: int, samples: list[Sample]) -> None:
        write_whole(self._shard(number), json.dumps([sample.model_dump(mode="json") for sample in samples]))

    def sheet(self, number: int) -> Path:
        return self.root / "sheets" / f"{number:05d}.png"

    def keep_images(self, samples: list[Sample], images: NDArray[np.uint8]) -> None:
        (self.root / "images").mkdir(exist_ok=True)
        for sample, image in zip(samples, images, strict=True):
            Image.fromarray(image).save(self.root / "images" / f"{sample.place:05d}-{sample.sample}.png")

    def samples(self) -> list[Sample]:
        """Of every finished shard, in order.

        Raises:
            ConfigError: a file of a shard is damaged; removing it has it sampled again.
        """
        found: list[Sample] = []
        for file in sorted((self.root / "shards").glob("[0-9]*.json")):
            try:
                found += [Sample.model_validate(row) for row in json.loads(file.read_text())]
            except ValueError as error:
                raise ConfigError(
                    f"{file}: damaged; remove it and evaluate again, the others are kept: {error}"
                ) from error
        return found

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_whole(self.root / "summary.json", json.dumps(summary, indent=2))

    def _shard(self, number: int) -> Path:
        return self.root / "shards" / f"{number:05d}.json"

    @property
    def _settings_file(self) -> Path:
        return self.root / "evaluation.json"
