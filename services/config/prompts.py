"""The section `prompts`: where prompts come from, how several sources mix, and which prompts are left out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints, model_validator

from services.config.section import Section

MixedName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
ENDLESS: Final = ("words", "shapes")
"""Sources that make their own prompts, held-out ones among them."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


class PromptSourceConfig(Section):
    """What every source has, be it the only one or one of several."""

    source: Literal["words", "shapes", "file", "dataset", "recorded", "mix"] = "file"
    """`words`: the quickstart's endless text-rendering prompts; `shapes`: coloured shapes, asked for in
    GenEval's six categories; `file`: a list of prompts; `dataset`: one of Hugging Face's; `mix`: several of
    these; `recorded`: whole groups that an earlier run has recorded, nothing is sampled (docs/offline.md)."""
    path: Path | None = None
    """For `file`: .txt with one prompt a line, .jsonl with {prompt, ...metadata} objects, or .parquet (or a
    directory of those). For `recorded`: the directory of the recording, `RUN_DIR/groups` or what
    `dgpo record` wrote."""
    dataset: str | None = None
    """For `dataset`: its name on the hub, or the path of a directory of data files, with / or . in front."""
    subset: str | None = None
    """Of a dataset that has several, which the library calls configurations."""
    split: str = "train"
    """Of a dataset."""
    revision: str | None = None
    """Of a dataset on the hub, the commit: 40 hexadecimal digits. A branch or a tag may move under a run."""
    text_column: str = "prompt"
    """Column, or key of a JSONL line, that holds the text."""
    metadata_columns: tuple[str, ...] | None = None
    """Columns or keys that go to the reward servers as metadata; null: all the others."""
    heldout_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of a file's or a dataset's prompts that is never trained and that evaluations use; a prompt's own
    text decides whether it is in it."""
    heldout_split: str | None = None
    """Of a dataset: the split whose prompts are held out, instead of a share."""

    @model_validator(mode="after")
    def _heeded(self) -> PromptSourceConfig:
        defaults = type(self).model_construct()
        ignored = [
            key
            for key, sources in _HEEDED_BY.items()
            if self.source not in sources and getattr(self, key) != getattr(defaults, key)
        ]
        if ignored and self.source in ENDLESS:
            raise ValueError(f"source {self.source!r} makes its own prompts: leave {', '.join(ignored)} out")
        if ignored:
            raise ValueError(f"{', '.join(ignored)} would do nothing with source {self.source!r}: leave out")
        if self.source in _HEEDED_BY["path"] and self.path is None:
            raise ValueError(f"source {self.source!r} needs a path")
        if self.source == "dataset":
            self._check_dataset()
        has_columns = self.text_column != "prompt" or self.metadata_columns is not None
        if has_columns and self.path is not None and self.path.suffix == ".txt":
            raise ValueError("a .txt file has no columns: leave text_column and metadata_columns out")
        return self

    def _check_dataset(self) -> None:
        if self.dataset is None:
            raise ValueError("source 'dataset' needs the name of one in dataset")
        if self.heldout_split is not None and self.heldout_share > 0:
            raise ValueError("held-out prompts are either a share or a split: set heldout_share to 0")
        if self.heldout_split is not None and self.heldout_split == self.split:
            raise ValueError(f"heldout_split {self.heldout_split!r} is the split that is trained on")
        # By its form: whether the directory is there differs between machines.
        local = self.dataset.startswith(("/", "."))
        if local and self.revision is not None:
            raise ValueError(f"dataset {self.dataset!r} is a directory, which has no revision: leave it out")
        if not local and _COMMIT.fullmatch(self.revision or "") is None:
            raise ValueError(
                f"dataset {self.dataset!r} needs a revision, the 40 hexadecimal digits of a commit (found "
                f"{self.revision!r}): what is on a branch may change under a run"
            )


_LISTS: Final = ("file", "dataset")
_HEEDED_BY: Final = {
    "path": ("file", "recorded"),
    "dataset": ("dataset",),
    "subset": ("dataset",),
    "split": ("dataset",),
    "revision": ("dataset",),
    "text_column": _LISTS,
    "metadata_columns": _LISTS,
    "heldout_share": _LISTS,
    "heldout_split": ("dataset",),
}
"""Which sources a setting means something to."""


class MixedSourceConfig(PromptSourceConfig):
    name: MixedName
    """Names it in errors; its order of prompts follows from it, not from the other sources."""
    weight: float = Field(default=1.0, gt=0)
    """How often it is drawn, relative to the others."""
    heldout_path: Path | None = None
    """For `file` and `dataset`: a file of held-out prompts, instead of a share."""

    @model_validator(mode="after")
    def _mixable(self) -> MixedSourceConfig:
        if self.source in ("recorded", "mix"):
            raise ValueError(f"a mix cannot have a source {self.source!r}: words, shapes, file or dataset")
        if self.heldout_path is not None and self.source not in _LISTS:
            raise ValueError(f"source {self.source!r} makes its own prompts: leave heldout_path out")
        if self.heldout_path is not None and (self.heldout_share > 0 or self.heldout_split is not None):
            raise ValueError("held-out prompts are a share, a split or a file: give one of them")
        return self


class CurriculumConfig(Section):
    """Leaves out prompts whose groups showed no difference between good and bad: solved always, or never."""

    after: int = Field(default=0, ge=0)
    """Groups of a prompt, the last ones, that must all have been without a difference; 0: no curriculum."""
    min_std: float = Field(default=0.0, ge=0)
    """A group whose total rewards have at most this standard deviation is without a difference."""
    revisit: float = Field(default=0.1, ge=0, le=1)
    """Share of what would be left out that is taken all the same: a model may learn what it could not do."""


class PromptsConfig(PromptSourceConfig):
    mix: tuple[MixedSourceConfig, ...] = ()
    """For `mix`: the sources."""
    curriculum: CurriculumConfig = CurriculumConfig()

    @model_validator(mode="after")
    def _whole(self) -> PromptsConfig:
        if (self.source == "mix") != bool(self.mix):
            raise ValueError("source 'mix' and a list of sources in mix need each other")
        names = [source.name for source in self.mix]
        if len(set(names)) != len(names):
            raise ValueError(f"mix: names must differ, got {names}")
        if self.source == "recorded" and self.curriculum.after > 0:
            raise ValueError(
                "curriculum chooses what is sampled, and source 'recorded' samples nothing: set "
                "curriculum.after to 0"
            )
        return self
