"""Prompt and seeds are a pure function of (run seed, ordinal); held-out prompts are never trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.config_file import ConfigError, load_config
from services.messages import PolicyVersion
from services.prompt_lists import read_prompts
from services.prompts import group_task, prompt_source, sample_seeds


def test_a_task_follows_from_seed_and_ordinal_alone() -> None:
    config = load_config("quickstart")

    def task(ordinal: int, epoch: int) -> object:
        source = prompt_source(config)
        made = group_task(config, source, "r", ordinal, 1, PolicyVersion(epoch=epoch, step=0))
        return made.prompt, made.seeds

    assert task(7, epoch=0) == task(7, epoch=3)
    assert task(7, epoch=0) != task(8, epoch=0)


def test_a_task_is_the_same_in_every_release() -> None:
    # Resuming a run under a newer release must not change what its ordinals mean.
    assert sample_seeds(0, "noise", 0, 2) == (5795898393558054558, 3766909712085036286)


def test_seeds_differ_between_purposes_and_runs() -> None:
    seeds = {sample_seeds(seed, purpose, 0, 1) for seed in (0, 1) for purpose in ("noise", "eval")}
    assert len(seeds) == 4


def test_held_out_words_are_never_trained() -> None:
    source = prompt_source(load_config("quickstart"))
    heldout = {prompt.text for prompt in source.heldout(99, 400)}
    trained = {source.training(0, ordinal).text for ordinal in range(2000)}
    assert len(heldout) == 400
    assert not heldout & trained
    assert source.heldout(99, 64) == source.heldout(99, 400)[:64]


def test_a_file_is_passed_through_whole_before_it_repeats(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n\nthree\n")
    config = load_config("quickstart", ["prompts.source=file", f"prompts.path={file}"])
    source = prompt_source(config)
    for turn in range(3):
        seen = {source.training(0, ordinal).text for ordinal in range(3 * turn, 3 * turn + 3)}
        assert seen == {"one", "two", "three"}
    assert source.heldout(0, 5) == []


def test_fewer_held_out_prompts_of_a_file_begin_the_list_of_more(tmp_path: Path) -> None:
    train, heldout = tmp_path / "train.txt", tmp_path / "heldout.txt"
    train.write_text("one\n")
    heldout.write_text("\n".join(f"prompt {place}" for place in range(1000)))
    config = load_config(
        "quickstart", ["prompts.source=file", f"prompts.path={train}", f"eval.path={heldout}"]
    )
    source = prompt_source(config)
    longest = source.heldout(99, 1000)
    assert len({prompt.text for prompt in longest}) == 1000
    for count in (64, 320, 400, 500):
        assert source.heldout(99, count) == longest[:count]
    assert source.heldout(99, 2000) == longest
    assert source.heldout(98, 1000) != longest


def test_jsonl_metadata_travels_with_the_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        json.dumps({"prompt": "a red cube", "tag": "colors", "include": [{"class": "cube"}]}) + "\n"
    )
    (prompt,) = read_prompts(file)
    assert prompt.text == "a red cube"
    assert prompt.metadata == {"tag": "colors", "include": [{"class": "cube"}]}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "holds no prompt"),
        ("{", "line 1"),
        ('{"prompt": "a"}\n{"text": "b"}', "line 2"),
        ("[1]", "line 1"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, content: str, named: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=named):
        read_prompts(file)


def test_held_out_prompts_that_are_trained_are_refused(tmp_path: Path) -> None:
    train, heldout = tmp_path / "train.txt", tmp_path / "heldout.txt"
    train.write_text("one\ntwo\n")
    heldout.write_text("two\nthree\n")
    config = load_config(
        "quickstart", ["prompts.source=file", f"prompts.path={train}", f"eval.path={heldout}"]
    )
    with pytest.raises(ConfigError, match="'two'"):
        prompt_source(config)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.jsonl", b'{"prompt": "  "}', "line 1: .*empty"),
        ("p.jsonl", b'{"prompt": "a", "x": NaN}', "line 1: .*NaN"),
        ("p.jsonl", b'{"prompt": "\\ud800"}', "line 1: .*surrogates"),
        ("p.csv", b"a,b", r"a .txt, .jsonl or .parquet file, the ending is '.csv'"),
    ],
)
def test_what_would_be_misread_is_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        read_prompts(tmp_path / name)


def test_a_byte_order_mark_and_blanks_hide_no_overlap(tmp_path: Path) -> None:
    (tmp_path / "bom.txt").write_bytes("\ufeffa cat\r\n".encode())
    (tmp_path / "blank.jsonl").write_text('{"prompt": " a cat\u2028 "}')
    assert [prompt.text for prompt in read_prompts(tmp_path / "bom.txt")] == ["a cat"]
    assert [prompt.text for prompt in read_prompts(tmp_path / "blank.jsonl")] == ["a cat"]


def test_held_out_shapes_are_never_trained_and_come_with_what_the_scorer_needs() -> None:
    source = prompt_source(load_config("quickstart", ["prompts.source=shapes"]))
    heldout = source.heldout(99, 400)
    trained = {source.training(0, ordinal).text for ordinal in range(2000)}
    assert len(heldout) == 400
    assert not {prompt.text for prompt in heldout} & trained
    assert source.heldout(99, 64) == heldout[:64]
    assert {prompt.metadata["tag"] for prompt in heldout[:6]} == {
        "single_object",
        "two_object",
        "counting",
        "colors",
        "position",
        "color_attr",
    }
    assert source.training(0, 7) == source.training(0, 7) != source.training(1, 7)


@pytest.mark.parametrize("name", ["words", "shapes"])
def test_a_source_that_makes_its_own_prompts_takes_no_path(name: str) -> None:
    with pytest.raises(ConfigError, match="leave path out"):
        load_config("quickstart", [f"prompts.source={name}", "prompts.path=prompts.txt"])
