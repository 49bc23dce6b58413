"""GenEval's prompts: their texts, the published test, and training sets beside it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from reward_servers.geneval.classes import CLASSES
from reward_servers.geneval.prompts import (
    TRAINING_WEIGHTS,
    evaluation_records,
    prompt_of,
    read_records,
    record_of,
    training_records,
    write_records,
)
from reward_servers.geneval.task import COLOURS, Requirement, Task, parse_task
from services.prompt_lists import HeldoutList, ListedPrompts, ReadPrompts, read_prompts

PUBLISHED = """
{"tag": "single_object", "include": [{"class": "orange", "count": 1}], "prompt": "a photo of an orange"}
{"tag": "single_object", "include": [{"class": "potted plant", "count": 1}], "prompt": "a photo of a potted plant"}
{"tag": "two_object", "include": [{"class": "frisbee", "count": 1}, {"class": "apple", "count": 1}], "prompt": "a photo of a frisbee and an apple"}
{"tag": "two_object", "include": [{"class": "computer mouse", "count": 1}, {"class": "zebra", "count": 1}], "prompt": "a photo of a computer mouse and a zebra"}
{"tag": "counting", "include": [{"class": "wine glass", "count": 2}], "exclude": [{"class": "wine glass", "count": 3}], "prompt": "a photo of two wine glasses"}
{"tag": "counting", "include": [{"class": "donut", "count": 4}], "exclude": [{"class": "donut", "count": 5}], "prompt": "a photo of four donuts"}
{"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "purple"}], "prompt": "a photo of a purple cup"}
{"tag": "position", "include": [{"class": "laptop", "count": 1}, {"class": "cow", "count": 1, "position": ["right of", 0]}], "prompt": "a photo of a cow right of a laptop"}
{"tag": "position", "include": [{"class": "broccoli", "count": 1}, {"class": "zebra", "count": 1, "position": ["below", 0]}], "prompt": "a photo of a zebra below a broccoli"}
{"tag": "color_attr", "include": [{"class": "handbag", "count": 1, "color": "pink"}, {"class": "scissors", "count": 1, "color": "black"}], "prompt": "a photo of a pink handbag and a black scissors"}
"""  # noqa: E501
RECORDS: list[dict[str, Any]] = [json.loads(line) for line in PUBLISHED.strip().split("\n")]


@pytest.mark.parametrize("record", RECORDS, ids=[record["prompt"] for record in RECORDS])
def test_texts_and_metadata_are_the_published_ones(record: dict[str, Any]) -> None:
    task = parse_task(record)
    assert prompt_of(task) == record["prompt"]
    assert record_of(task) == record
    assert record in evaluation_records()


def test_the_test_is_the_published_one() -> None:
    records = evaluation_records()
    assert Counter(record["tag"] for record in records) == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    # Of the published file: its lines, keys in order, sorted.
    lines = sorted(json.dumps(record, sort_keys=True) for record in records)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "ac3c481628128939793c13827f94fb83c9bc0a7efef1c29bfbe1c117c8c99e5e"


def test_another_seed_is_another_test() -> None:
    texts = [{record["prompt"] for record in evaluation_records(seed)} for seed in (43, 44)]
    assert len(texts[0] & texts[1]) < 200


@pytest.mark.parametrize("weights", (TRAINING_WEIGHTS, {"two_object": 1}, {"position": 1}, {"colors": 1}))
def test_training_never_shows_a_scene_of_the_test(weights: dict[str, float]) -> None:
    test = {record["prompt"] for record in evaluation_records()}
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    records = training_records(3000, 7, weights=weights)
    for record in records:
        task = parse_task(record, classes=CLASSES, colours=COLOURS)
        same = {prompt_of(task)}
        if len(task.include) == 2:
            a, b = task.include
            turned = (b, a)
            if b.relation is not None:
                turned = (
                    Requirement(b.name, 1),
                    Requirement(a.name, 1, relation=mirrored[b.relation], target=0),
                )
            same.add(prompt_of(Task(task.tag, turned)))
            assert len(same) == 2
        assert not same & test


def test_counting_has_160_prompts_to_train_on() -> None:
    records = training_records(5000, 1, weights={"counting": 1})
    assert len({record["prompt"] for record in records}) == 240 - 80


def test_what_is_held_out_is_the_callers() -> None:
    free = training_records(2000, 1, held_out=[], weights={"single_object": 1})
    assert {record["include"][0]["class"] for record in free} == set(CLASSES)
    held_out = [record for record in evaluation_records() if "cup" not in record["prompt"]]
    left = training_records(20, 1, held_out=held_out, weights={"single_object": 1})
    assert {record["prompt"] for record in left} == {"a photo of a cup"}


def test_the_mixture_is_flow_grpos() -> None:
    counts = Counter(record["tag"] for record in training_records(3400, 3))
    for tag, weight in TRAINING_WEIGHTS.items():
        assert counts[tag] / 200 == pytest.approx(weight, rel=0.2)


def test_training_records_follow_from_the_seed() -> None:
    assert training_records(50, 5) == training_records(50, 5) != training_records(50, 6)
    assert training_records(0, 5) == []


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"single_object": 1}, "single_object: every prompt seems to be held out"),
        ({"couting": 1}, "no tag 'couting'; valid: single_object"),
        ({"counting": 0}, "not all 0"),
        ({"counting": 2, "colors": -1}, "at least 0"),
        ({"counting": float("nan")}, "numbers of at least 0"),
    ],
)
def test_mixtures_that_cannot_be_drawn(weights: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        training_records(10, 0, weights=weights)


def test_a_task_without_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no prompt is known for counting of 1 objects"):
        prompt_of(Task("counting", (Requirement("cup", 11),)))
    with pytest.raises(ValueError, match="no prompt is known for two_object of 1 objects"):
        prompt_of(Task("two_object", (Requirement("cup", 1),)))


def test_a_run_reads_the_files(tmp_path: Path) -> None:
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    records = training_records(40, 2)
    write_records(train, records)
    write_records(test, evaluation_records())
    assert read_records(train) == records
    prompts = read_prompts(train)
    assert [prompt.text for prompt in prompts] == [record["prompt"] for record in records]
    assert [record_of(parse_task(prompt.metadata)) for prompt in prompts] == records
    heldout = HeldoutList(ReadPrompts(read_prompts(test)), "test")
    assert len(ListedPrompts(ReadPrompts(prompts), "train", heldout=heldout).heldout(0, 1000)) == 553


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2"),
        ('"a photo"', "line 2: expected a JSON object with a 'prompt' text"),
        ('{"tag": "counting"}', "line 2: expected a JSON object with a 'prompt' text"),
        ('{"prompt": "a", "tag": "counting", "include": []}', "line 2: include: expected at least one"),
        (
            '{"prompt": "a", "tag": "counting", "include": [{"class": "mouse", "count": 1}]}',
            r"line 2: include\[0\].class: 'mouse' is no class",
        ),
    ],
)
def test_a_file_that_holds_something_else(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(f"{json.dumps(RECORDS[0])}\n{line}\n")
    with pytest.raises(ValueError, match=says):
        read_records(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_records(tmp_path / "records.jsonl")
