"""What a suite asks for: the published test, this project's own texts, and lists that users bring."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from services.config import Config
from services.config_file import ConfigError, load_config
from services.messages import Prompt
from services.suites.prompts import Columns, load_suite, tags_of
from services.suites.written_text import written_text_prompts


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("quickstart")


def test_geneval_has_553_prompts_with_metadata_and_six_tags(config: Config) -> None:
    suite = load_suite("geneval", config)
    assert len({prompt.text for prompt in suite.prompts}) == 553
    assert len(tags_of(suite)) == 6
    assert suite.prompts[0].metadata["include"][0]["count"] == 1
    assert "prompt" not in suite.prompts[0].metadata


def test_the_texts_to_write_are_quoted_counted_and_the_same_in_every_release(config: Config) -> None:
    suite = load_suite("ocr", config)
    assert Counter(suite.tags) == {"1 word": 75, "2 words": 75, "3 words": 75, "4 words": 75}
    texts = [re.findall('"([^"]+)"', prompt.text) for prompt in suite.prompts]
    assert all(len(found) == 1 for found in texts)
    assert len({found[0] for found in texts}) == 300
    assert {len(found[0].split()): tag for found, tag in zip(texts, suite.tags, strict=True)}[3] == "3 words"
    assert suite.digest == "29db373a835e60a8c334f80dc0d978063d8d58d302f306ed0945c185f21b7f4d"
    assert written_text_prompts(seed=2) != list(suite.prompts)


def test_held_out_prompts_are_those_of_the_recipe(config: Config) -> None:
    suite = load_suite("heldout", config, limit=5)
    assert len(suite.prompts) == 5
    assert suite.prompts[0].text.startswith('a sign that says "')
    none = load_config("quickstart", ["prompts={source: file, path: README.md}"])
    with pytest.raises(ConfigError, match="README"):
        load_suite("heldout", none)


def test_a_file_is_a_suite_with_tags_of_its_own(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [{"prompt": "a", "tag": "x"}, {"prompt": "b", "tag": "y"}, {"prompt": "c", "tag": None}]
    file.write_text("\n".join(map(json.dumps, rows)))
    suite = load_suite(str(file), config)
    assert [prompt.text for prompt in suite.prompts] == ["a", "b", "c"]
    assert suite.tags == ("x", "y", None)
    (tmp_path / "other.jsonl").write_text('{"caption": "a", "kind": 7}')
    other = load_suite(str(tmp_path / "other.jsonl"), config, columns=Columns(text="caption", tag="kind"))
    assert (other.prompts[0].text, other.tags) == ("a", ("7",))
    assert len(load_suite(str(file), config, limit=2).prompts) == 2


def test_the_digest_tells_texts_metadata_and_order(config: Config, tmp_path: Path) -> None:
    digests = set()
    for number, text in enumerate(["a\nb", "b\na", "a"]):
        (tmp_path / f"{number}.txt").write_text(text)
        digests.add(load_suite(str(tmp_path / f"{number}.txt"), config).digest)
    assert len(digests) == 3


def test_drawbench_is_read_from_where_the_user_has_it(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not shipped.*--prompts FILE"):
        load_suite("drawbench", config)
    file = tmp_path / "drawbench.jsonl"
    file.write_text(json.dumps({"Prompts": "A red car.", "Category": "Colors"}))
    suite = load_suite("drawbench", config, prompts=str(file))
    assert suite.prompts == (Prompt(text="A red car.", metadata={"Category": "Colors"}),)
    assert suite.tags == ("Colors",)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("genevall", {}, "neither a file nor one of geneval, ocr, drawbench, heldout"),
        ("dataset:org/name", {}, "say which commit"),
        ("geneval", {"prompts": "p.txt"}, "--prompts is for --suite drawbench"),
        ("ocr", {"columns": Columns(tag="x")}, "are for lists"),
    ],
)
def test_what_is_no_suite_is_refused(config: Config, name: str, options: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_suite(name, config, **options)  # type: ignore[arg-type]
