"""Kept groups by page: order, ranking, torn ones, what is listed and read again."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from services.config_file import load_config
from services.report.samples import load_group
from services.run_directory import RunDirectory
from services.ui.gallery import KEPT_STRIPS, Gallery
from tests.unit.services.ui.made_runs import keep_group


def _gallery(run: RunDirectory) -> Gallery:
    gallery = Gallery(run.samples, load_config("quickstart"))
    gallery.refresh()
    return gallery


def test_newest_first_with_best_and_worst(run: RunDirectory) -> None:
    keep_group(run, 0, 0, [0.5, 0.5])
    keep_group(run, 10, 80, [0.25, 1.0, 0.0, 0.75])
    page = _gallery(run).page(0, 12)
    assert [group["step"] for group in page["groups"]] == [10, 0]
    ranked, flat = page["groups"]
    assert [member["place"] for member in ranked["members"]] == [1, 3, 0, 2]
    assert [member["total"] for member in ranked["members"]] == [1.0, 0.75, 0.25, 0.0]
    advantages = [member["advantage"] for member in ranked["members"]]
    assert advantages == sorted(advantages, reverse=True)
    assert abs(sum(advantages)) < 1e-9
    assert [(member["best"], member["worst"]) for member in ranked["members"]] == [
        (True, False),
        (False, False),
        (False, False),
        (False, True),
    ]
    assert ranked["members"][0]["text"] == "K1"
    assert ranked["members"][0]["scores"] == (("tesseract", 0.5),)
    assert flat["flat"]
    assert not any(member["best"] or member["worst"] for member in flat["members"])


def test_pages_and_the_place_of_a_step(run: RunDirectory) -> None:
    for step in range(10):
        keep_group(run, step, 8 * step, [0.1, 0.9])
    gallery = _gallery(run)
    assert [group["step"] for group in gallery.page(3, 2)["groups"]] == [6, 5]
    assert gallery.page(8, 12)["groups"][-1]["step"] == 0
    assert gallery.page(99, 12)["groups"] == []
    assert gallery.place_of(7) == 2
    assert gallery.place_of(99) == 0


def test_what_is_listed_again(run: RunDirectory) -> None:
    keep_group(run, 0, 0, [0.1, 0.9])
    keep_group(run, 1, 8, [0.1, 0.9])
    gallery = _gallery(run)
    assert gallery.folders_listed == 2
    assert not gallery.refresh()
    keep_group(run, 1, 9, [0.1, 0.9])
    keep_group(run, 2, 16, [0.1, 0.9])
    assert gallery.refresh()
    assert gallery.folders_listed == 4
    assert len(gallery) == 4


def test_a_torn_group_is_on_its_page_and_read_again(run: RunDirectory) -> None:
    path = keep_group(run, 1, 8, [0.1, 0.9])
    whole = path.read_text()
    path.write_text(whole[:20])
    gallery = _gallery(run)
    assert "group-000008.json" in gallery.page(0, 1)["groups"][0]["problem"]
    path.write_text(whole)
    assert gallery.page(0, 1)["groups"][0]["prompt"] == "a sign"


def test_a_run_without_samples_has_no_groups(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path / "samples", None)
    assert not gallery.refresh()
    assert gallery.page(0, 12) == {"total": 0, "first": 0, "groups": []}


def test_foreign_files_are_left_alone(run: RunDirectory) -> None:
    keep_group(run, 1, 8, [0.1, 0.9])
    (run.samples / "step-x").mkdir()
    (run.samples / "step-000002").write_text("a file")
    (run.samples / "step-000001" / "notes.txt").write_text("mine")
    assert len(_gallery(run)) == 1


def test_images_are_the_samples_exactly_and_few_are_kept(run: RunDirectory) -> None:
    paths = [keep_group(run, step, 8 * step, [0.1, 0.9]) for step in range(KEPT_STRIPS + 3)]
    gallery = _gallery(run)
    for step, path in enumerate(paths):
        loaded = load_group(path)
        assert loaded is not None
        found = gallery.image(f"{step}-{8 * step:06d}", 1)
        assert found is not None
        assert (np.asarray(Image.open(io.BytesIO(found[1]))) == np.asarray(loaded[1][1])).all()
    assert len(gallery._strips) == KEPT_STRIPS


def test_a_group_written_anew_is_another_image(run: RunDirectory) -> None:
    path = keep_group(run, 1, 8, [0.1, 0.9])
    gallery = _gallery(run)
    before, changed = gallery.image("1-000008", 0), gallery.page(0, 1)["groups"][0]["changed"]
    keep_group(run, 1, 9, [0.1, 0.9])
    (path.parent / "group-000009.png").replace(path.with_suffix(".png"))
    os.utime(path, ns=(1, 1))
    assert gallery.page(0, 1)["groups"][0]["changed"] != changed
    assert gallery.image("1-000008", 0) != before
