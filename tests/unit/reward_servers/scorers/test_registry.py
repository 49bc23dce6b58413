"""Scorers by name and by where they are; the example of the documentation; what makes a version."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reward_servers.scorers
from reward_servers.scorer import ItemScore, Scorer, ScorerOptions
from reward_servers.scorers import is_scorer, load_scorer, scorer_names
from reward_servers.wire import ScoreCall
from services.config_file import PROJECT_ROOT


@pytest.fixture
def redness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the scorer that docs/rewards.md writes, on Python's path."""
    page = (PROJECT_ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Redness" in code]
    (tmp_path / "redness.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("as_file", [True, False])
def test_the_example_of_the_documentation_is_a_scorer(
    redness: Path, monkeypatch: pytest.MonkeyPatch, as_file: bool
) -> None:
    name = "redness" if as_file else "redness:create"
    if as_file:
        monkeypatch.setattr(
            reward_servers.scorers, "__path__", [*reward_servers.scorers.__path__, str(redness)]
        )
        assert "redness" in scorer_names()
    assert is_scorer(name)
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, :, 0] = 255
    scorer = load_scorer(name)
    assert [item.score for item in scorer.score(ScoreCall([image], ["p"], [{}]))] == [0.5]
    with pytest.raises(ValueError, match="no such argument: hue; valid: "):
        load_scorer(name, {"hue": 1})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no.such.package:create", "no scorer 'no.such.package:create': expected package.module:create"),
        ("reward_servers.scorers.jpeg:", "expected package.module:create"),
        ("reward_servers.scorers.jpeg:make", "reward_servers.scorers.jpeg has no make"),
        ("../jpeg:create", "expected package.module:create"),
        ("jpg", "no scorer 'jpg'; valid: .*jpeg.*, or package.module:create"),
    ],
)
def test_what_is_nowhere_is_refused(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_scorer(name)


class Painted(Scorer):
    name, version, model, batch_invariant, max_batch = "painted", "3", "none", True, 4

    def score(self, call: ScoreCall) -> Sequence[ItemScore]:
        return [ItemScore(0.0)] * len(call)

    def warm_up(self) -> None: ...


class PaintedOptions(ScorerOptions):
    colour: str = "red"


def forgetful(args: dict[str, Any], threads: int) -> Painted:
    PaintedOptions.model_validate(args)
    return Painted()


def test_a_scorer_that_forgets_its_arguments_is_refused() -> None:
    assert load_scorer(f"{__name__}:forgetful").full_version == "3"
    with pytest.raises(TypeError, match=r"set `self\.options` to its arguments: 'colour'"):
        load_scorer(f"{__name__}:forgetful", {"colour": "blue"})


def test_an_argument_that_moves_scores_is_another_version() -> None:
    versions = [
        load_scorer("ocr", args).full_version
        for args in ({}, {"match": "contained"}, {"match": "exact"}, {"detect": True}, {"input_width": 96})
    ]
    assert versions[:2] == ["1", "1"], "a default is a default, said or not"
    assert len(set(versions)) == 4 and all(re.fullmatch(r"1(-[0-9a-f]{8})?", each) for each in versions)
    assert load_scorer("jpeg", {"quality": 60}).full_version != load_scorer("jpeg").full_version
    assert load_scorer("shapes", {"rule": "dense"}).full_version != load_scorer("shapes").full_version


def test_arguments_of_the_machine_are_in_no_version() -> None:
    from reward_servers.scorers.geneval import GenevalOptions

    digest = GenevalOptions().digest()
    assert digest == GenevalOptions(device="cuda", max_batch=2).digest() == ""
    different: list[dict[str, Any]] = [
        {"rule": "dense"},
        {"rule": "dense", "published_bug": True},
        {"threshold": 0.5},
        {"revision": "0" * 40},
        {"clip_revision": "0" * 40},
        {"dtype": "float16"},
    ]
    assert len({GenevalOptions(**args).digest() for args in different}) == len(different)


@pytest.mark.parametrize("name", ["jpeg", "shapes", "ocr_tesseract", "benchmarks.timed_scorer:create"])
def test_threads_that_would_do_nothing_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="threads=2 would do nothing"):
        load_scorer(name, threads=2)


def test_threads_of_a_network_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every one, whatever becomes of its weights."""
    for name in ("geneval", "pickscore", "hpsv2", "imagereward", "aesthetic", "clipscore"):
        told: list[int] = []
        monkeypatch.setattr(torch, "set_num_threads", told.append)
        place = {"geneval": "detector", "aesthetic": "head"}.get(name, "path")
        with pytest.raises(ValueError, match="no such file"):
            load_scorer(name, {place: "/no/such/folder"}, threads=3)
        assert told == [3], name
