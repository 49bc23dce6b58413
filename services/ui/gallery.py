"""The groups that a run has kept, by page, newest first; and their images.

Promises
- A folder of samples/ is listed once, and again when it has changed; a page reads the groups on it, no other.
- A group that cannot be read is on its page and says so: it is being written, or torn.
- Of groups and images that were looked at a few are kept, until they change: memory does not grow.

Layout and limits of what is read: services/report/samples.py.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from services.config import Config
from services.report.ranking import ranked_group
from services.report.samples import encoded, groups_in, load_group_images, read_group, step_of

MOST_ON_A_PAGE = 48
KEPT_GROUPS = 256
KEPT_STRIPS = 4
KEPT_IMAGES = 512
SMALL_SIDE = 128
"""Images up to this are drawn with their pixels."""


@dataclass(frozen=True)
class Kept:
    """One group in samples/."""

    step: int
    path: Path
    changed: int
    """When it was last written, ns: part of the address of its images."""

    @property
    def key(self) -> str:
        """Names it in addresses: `120-960`."""
        return f"{self.step}-{self.path.stem.removeprefix('group-')}"


@dataclass(frozen=True)
class _Folder:
    changed: int
    groups: tuple[Kept, ...]


class Gallery:
    """Knows what is in samples/; `refresh` looks again."""

    def __init__(self, samples: Path, config: Config | None) -> None:
        self._samples, self._config = samples, config
        self._folders: dict[str, _Folder] = {}
        self._groups: list[Kept] = []
        self._by_key: dict[str, Kept] = {}
        self._strips: OrderedDict[Kept, list[Image.Image]] = OrderedDict()
        self._images: OrderedDict[tuple[Kept, int], tuple[str, bytes]] = OrderedDict()
        self._read = lru_cache(maxsize=KEPT_GROUPS)(self._read_group)
        self.folders_listed = 0
        self.groups_read = 0
        """Both for tests and the bench."""

    def __len__(self) -> int:
        return len(self._groups)

    def refresh(self) -> bool:
        """Look what is new; True where something is. One caller at a time."""
        found: dict[str, _Folder] = {}
        changed = False
        try:
            entries = [entry for entry in os.scandir(self._samples) if entry.name.startswith("step-")]
        except FileNotFoundError:
            entries = []
        for entry in entries:
            step = step_of(Path(entry.path))
            if step is None:
                continue
            try:
                at = entry.stat(follow_symlinks=False).st_mtime_ns
                known = self._folders.get(entry.name)
                if known is None or known.changed != at:
                    self.folders_listed += 1
                    changed = True
                    known = _Folder(at, tuple(_kept(step, path) for path in groups_in(Path(entry.path))))
            except OSError:
                continue
            found[entry.name] = known
        if changed or len(found) != len(self._folders):
            self._folders = found
            groups = [group for folder in found.values() for group in folder.groups]
            self._groups = sorted(groups, key=lambda group: (group.step, group.path.name), reverse=True)
            self._by_key = {group.key: group for group in self._groups}
            return True
        return False

    def page(self, first: int, count: int) -> dict[str, Any]:
        """`count` groups, newest first, from the `first` newest on."""
        groups = self._groups
        shown = groups[max(first, 0) : max(first, 0) + min(max(count, 1), MOST_ON_A_PAGE)]
        return {"total": len(groups), "first": first, "groups": [self._group(kept) for kept in shown]}

    def place_of(self, step: int) -> int:
        """How many groups are newer than those of this step: where its page begins."""
        return sum(group.step > step for group in self._groups)

    def _group(self, kept: Kept) -> dict[str, Any]:
        kept = _now(kept)
        head = {"key": kept.key, "step": kept.step, "changed": str(kept.changed)}
        try:
            return head | self._read(kept)
        except ValueError as error:
            return {**head, "problem": f"{error}: {kept.path.parent.name}/{kept.path.name}."}

    def _read_group(self, kept: Kept) -> dict[str, Any]:
        """What is told of a group; an error is not remembered."""
        self.groups_read += 1
        sample = read_group(kept.path)
        if sample is None:
            raise ValueError("It cannot be read")
        ranked = ranked_group(sample, self._config) if self._config else None
        if ranked is None:
            raise ValueError("It lacks a reward that the run trains on")
        return {
            "ordinal": sample.ordinal,
            "prompt": sample.prompt,
            "version": sample.version,
            "mean": ranked.mean,
            "flat": ranked.flat,
            "members": [asdict(member) for member in ranked.members],
        }

    def image(self, key: str, place: int) -> tuple[str, bytes] | None:
        """Media type and bytes of one sample; None where there is no such one. For one thread at a time."""
        kept = self._by_key.get(key)
        if kept is None:
            return None
        kept = _now(kept)
        if (kept, place) in self._images:
            self._images.move_to_end((kept, place))
            return self._images[kept, place]
        strip = self._strips.get(kept)
        if strip is None:
            sample = read_group(kept.path)
            strip = load_group_images(kept.path, sample.size) if sample else None
            if strip is None:
                return None
            self._strips[kept] = strip
            while len(self._strips) > KEPT_STRIPS:
                self._strips.popitem(last=False)
        if not 0 <= place < len(strip):
            return None
        self._images[kept, place] = encoded(strip[place])
        while len(self._images) > KEPT_IMAGES:
            self._images.popitem(last=False)
        return self._images[kept, place]


def _kept(step: int, path: Path) -> Kept:
    return Kept(step, path, path.stat().st_mtime_ns)


def _now(kept: Kept) -> Kept:
    """A resumed run writes some groups anew, which does not show in their folder."""
    try:
        return _kept(kept.step, kept.path)
    except OSError:
        return kept
