"""The folder of an evaluation, its summary, and the comparison of two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from learner.checkpoint import write_checkpoint
from services.config_file import ConfigError, load_config
from services.messages import Prompt
from services.suites.compare import compare
from services.suites.folder import UNKNOWN, EvaluationFolder, Sample
from services.suites.prompts import Suite
from services.suites.settings import EvaluationSettings, settings_of, with_rewards
from services.suites.sheet import CELL, caption, escaped, write_sheet
from services.suites.summary import summarize

TAGS = ("x", "x", "y")


def settings(**changes: Any) -> EvaluationSettings:
    told: dict[str, Any] = {
        "model": "somewhere",
        "base": "base",
        "weights": "digest",
        "kind": "ema",
        "suite": "mine",
        "prompts": len(TAGS),
        "prompts_digest": "prompts",
        "samples": 2,
        "seed": 99,
        "shard_prompts": 2,
        "sampling": {"guidance": 1.0},
        "rewards": {"ocr": {"app": "ocr", "args": {}, "url": None}},
    }
    return EvaluationSettings.model_validate(told | changes)


def sample(place: int, number: int, score: float, **changes: Any) -> Sample:
    told = {
        "place": place,
        "sample": number,
        "seed": 10 * place + number,
        "prompt": f"prompt {place}",
        "tag": TAGS[place],
        "scores": {"ocr": score, "ocr.exact": float(score == 1)},
        "details": {"ocr": {"exact": score == 1}},
    }
    return Sample.model_validate(told | changes)


def written(root: Path, scores: list[tuple[float, float]], shards: int = 2, **changes: Any) -> Path:
    """Two samples of each of three prompts, in two shards."""
    folder = EvaluationFolder.prepare(root, settings(**changes))
    rows = [[sample(place, number, pair[number]) for number in range(2)] for place, pair in enumerate(scores)]
    for shard in range(shards):
        folder.write_shard(shard, [row for own in rows[2 * shard : 2 * shard + 2] for row in own])
    return root


def test_what_is_finished_is_not_missing(tmp_path: Path) -> None:
    folder = EvaluationFolder.prepare(tmp_path / "e", settings())
    assert folder.missing() == [0, 1]
    folder.write_shard(1, [sample(2, 0, 0.5)])
    assert EvaluationFolder.prepare(tmp_path / "e", settings(model="moved")).missing() == [0]
    assert folder.samples() == [sample(2, 0, 0.5)]


def test_other_settings_are_refused_with_every_difference(tmp_path: Path) -> None:
    EvaluationFolder.prepare(tmp_path / "e", settings())
    with pytest.raises(ConfigError) as error:
        EvaluationFolder.prepare(tmp_path / "e", settings(samples=4, sampling={"guidance": 4.5}))
    assert "samples: 4; there 2" in str(error.value)
    assert "sampling.guidance: 4.5; there 1.0" in str(error.value)


def test_other_scorers_are_refused(tmp_path: Path) -> None:
    folder = EvaluationFolder.prepare(tmp_path / "e", settings())
    folder.check_scorers({"ocr": "none, version 0"})
    # Nothing is finished yet.
    folder.check_scorers({"ocr": "one, version 1"})
    folder.write_shard(0, [sample(0, 0, 0.5)])
    folder.check_scorers({"ocr": "one, version 1"})
    for _ in range(2):
        with pytest.raises(ConfigError, match="'two, version 1'; there 'one, version 1'"):
            folder.check_scorers({"ocr": "two, version 1"})
        # A server that does not say what it is hides nothing that is known.
        folder.check_scorers({"ocr": UNKNOWN})


def test_what_scores_may_be_told_later(tmp_path: Path) -> None:
    folder = EvaluationFolder.prepare(tmp_path / "e", settings())
    folder.check_scorers({"ocr": UNKNOWN})
    folder.write_shard(0, [sample(0, 0, 0.5)])
    folder.check_scorers({"ocr": "one, version 1"})
    with pytest.raises(ConfigError, match="there 'one, version 1'"):
        folder.check_scorers({"ocr": "two, version 1"})


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no evaluation"):
        EvaluationFolder.prepare(tmp_path, settings())
    with pytest.raises(ConfigError, match="no evaluation of a suite"):
        EvaluationFolder.open(tmp_path)


def test_two_processes_at_once_are_refused(tmp_path: Path) -> None:
    folder = EvaluationFolder.prepare(tmp_path / "e", settings())
    with folder.locked(), pytest.raises(ConfigError, match="another process"), folder.locked():
        pass


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    root = written(tmp_path / "e", [(0, 1), (1, 1), (0, 0)])
    (root / "shards" / "00000.json").write_text('[{"place": 0}]')
    with pytest.raises(ConfigError, match=r"00000\.json: damaged; remove it"):
        EvaluationFolder.open(root).samples()


def test_the_summary_has_means_by_reward_and_tag(tmp_path: Path) -> None:
    found = summarize(EvaluationFolder(written(tmp_path / "e", [(0, 1), (1, 1), (0, 0)])))
    assert (found["prompts"], found["images"]) == (3, 6)
    assert found["rewards"]["ocr"]["mean"] == 0.5
    # Prompt means 1/2, 1, 0: their standard deviation is 1/2.
    assert found["rewards"]["ocr"]["se"] == pytest.approx(0.5 / 3**0.5)
    assert found["exact"]["ocr"]["mean"] == 0.5
    assert found["tags"]["x"] == {
        "prompts": 2,
        "rewards": {"ocr": {"mean": 0.75, "se": 0.25}},
        "exact": {"ocr": {"mean": 0.75, "se": 0.25}},
    }
    assert found["tag_mean"]["rewards"]["ocr"]["mean"] == 0.375


def test_differences_are_taken_image_by_image(tmp_path: Path) -> None:
    first = written(tmp_path / "a", [(0, 1), (0, 0), (0.5, 0.5)])
    second = written(tmp_path / "b", [(1, 1), (0.5, 0.5), (0, 0)], sampling={"guidance": 4.5})
    found = compare(first, second, resamples=1000)
    # By prompt 1/2, 1/2, -1/2: standard deviation 1/sqrt(3).
    overall = found["measures"]["ocr"]
    assert overall["difference"] == pytest.approx(1 / 6)
    assert overall["se"] == pytest.approx(1 / 3)
    assert (overall["low"], overall["high"]) == (-0.5, 0.5)
    assert (overall["better"], overall["worse"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    tagged = found["tags"]["x"]["ocr"]
    assert (tagged["difference"], tagged["low"], tagged["high"]) == (0.5, 0.5, 0.5)
    assert found["tag_mean"]["ocr"]["difference"] == 0.0
    assert found["otherwise"] == ["sampling.guidance: 1.0; there 4.5"]
    assert compare(first, second, resamples=1000) == found
    backwards = compare(second, first, resamples=1000)["measures"]["ocr"]
    assert backwards["difference"] == pytest.approx(-1 / 6)


def test_what_does_not_pair_is_refused_or_left_out_when_asked(tmp_path: Path) -> None:
    scores = [(0.0, 1.0), (0.0, 0.0), (0.5, 0.5)]
    whole, begun = written(tmp_path / "a", scores), written(tmp_path / "b", scores, shards=1)
    with pytest.raises(ConfigError, match="not finished, 1 shards are missing"):
        compare(whole, begun)
    assert compare(whole, begun, common=True, resamples=100)["prompts"] == 2
    other = written(tmp_path / "c", scores)
    rows = json.loads((other / "shards" / "00001.json").read_text())
    (other / "shards" / "00001.json").write_text(json.dumps([row | {"seed": 7} for row in rows]))
    with pytest.raises(ConfigError, match="4 of 6 and 6 images have the same prompt and seed; --common"):
        compare(whole, other)
    assert compare(whole, other, common=True, resamples=100)["images"] == 4


def test_what_an_evaluation_depends_on_is_told_by_what_it_is() -> None:
    config = with_rewards(load_config("quickstart"), ["ocr"])
    suite = Suite("mine", (Prompt(text="a"),), (None,))
    told = settings_of(config, None, "ema", suite, 1)
    assert list(told.differences(told.model_copy(update={"model": "elsewhere"}))) == []
    guided = config.model_copy(update={"rollout": config.rollout.model_copy(update={"guidance": 4.5})})
    assert list(told.differences(settings_of(guided, None, "ema", suite, 1))) == [
        "sampling.guidance: 1.0; there 4.5"
    ]
    for section, key, value in (
        *(("rollout", "sigmas", "fractions"), ("rollout", "terminal", 0.02)),
        *(("model", "embedded_guidance", 7.5), ("model", "dtype", "float16")),
    ):
        other = config.model_copy(update={section: getattr(config, section).model_copy(update={key: value})})
        (line,) = told.differences(settings_of(other, None, "ema", suite, 1))
        assert line.startswith(f"sampling.{key}: ") and line.endswith(f"there {value!r}")
    more = config.model_copy(update={"rollout": config.rollout.model_copy(update={"workers": 7})})
    assert settings_of(more, None, "ema", suite, 1) == told


def test_the_alpha_of_a_checkpoints_adapters_is_told(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1, {"ema": {"weight": torch.ones(2)}}, {"epoch": 0}, keep=1)
    suite = Suite("mine", (Prompt(text="a"),), (None,))
    one, two = (
        settings_of(
            load_config("quickstart", ["model.train=lora", f"model.lora.alpha={alpha}"]),
            *(checkpoint, "ema", suite, 1),
        )
        for alpha in (8, 16)
    )
    assert list(one.differences(two)) == ["sampling.lora.alpha: 8.0; there 16.0"]


def test_rewards_are_chosen_by_name_from_the_recipe_or_the_scorers() -> None:
    recipe = load_config("quickstart")
    chosen = with_rewards(recipe, ["tesseract,jpeg", 'clipscore={"model": "here"}']).rewards
    assert [(reward.name, reward.app) for reward in chosen] == [
        ("tesseract", "ocr_tesseract"),
        ("jpeg", "jpeg"),
        ("clipscore", "clipscore"),
    ]
    assert chosen[2].args == {"model": "here"}
    assert not any(reward.heldout for reward in chosen)
    assert [reward.name for reward in with_rewards(recipe, []).rewards] == ["ocr", "tesseract"]


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (["nothing"], "no reward of that name"),
        (["ocr={"], "are no JSON"),
        (["ocr=[1]"], "a JSON object"),
        (["ocr,ocr"], "names one twice"),
    ],
)
def test_rewards_that_cannot_be_are_refused(chosen: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        with_rewards(load_config("quickstart"), chosen)


def test_captions_show_every_character_of_a_prompt() -> None:
    told = sample(0, 1, 0.25, prompt="two\nlines\u202e\x1b[31m " + "w" * 200)
    lines = caption(told)
    assert lines[0].startswith("0.1 two\\nlines\\u202e\\x1b[31m")
    assert len(lines) == 4
    assert lines[2].endswith("…")
    assert lines[-1] == "ocr 0.250  ocr.exact 0.000"
    assert escaped("naïve 日本") == "naïve 日本"


@pytest.mark.parametrize(("size", "samples"), [((32, 64), 1), ((512, 512), 2)])
def test_a_sheet_has_a_cell_for_every_image(tmp_path: Path, size: tuple[int, int], samples: int) -> None:
    rows = [sample(place, number, 0.5) for place in range(3) for number in range(samples)]
    images = np.full((len(rows), *size, 3), 128, dtype=np.uint8)
    write_sheet(images, rows, tmp_path / "s.png", samples_a_prompt=samples)
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.format == "PNG"
        columns = 3 if samples == 1 else samples
        assert sheet.width == columns * CELL
        assert sheet.height % (1 if samples == 1 else 3) == 0
        assert sheet.getpixel((CELL // 2, 20)) == (128, 128, 128)
