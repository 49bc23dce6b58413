"""How a judge's answer becomes a score, or does not."""

from __future__ import annotations

import base64
import json
import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from reward_servers.vlm.question import image_url
from reward_servers.vlm.reading import NoScore, read_answer, read_score

PUBLISHED = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)")


def completion(content: str, finish_reason: str) -> bytes:
    choice = {"message": {"content": content}, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice]}).encode()


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Final Score: 4", 4.0),
        ("Final Score:\n3.25.", 3.25),
        ("Final Score: 4/5", 4.0),
        ("Final Score: 4 out of 5, as said", 4.0),
        ("**Final Score: 2**", 2.0),
        ("Final Score: 3\nIn short, Final Score: 3.0", 3.0),
        ("Final Score: 1", 1.0),
    ],
)
def test_read_score(text: str, score: float) -> None:
    assert read_score(text, PUBLISHED, (1.0, 5.0)) == score


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Final Score: 2. On reflection, Final Score: 4", r"several scores, \[2.0, 4.0\]"),
        ("Final Score: 35", "only the beginning"),
        ("Final Score: 4,5", "only the beginning"),
        ("Final Score: 5.01", "outside 1 to 5"),
        ("Final Score: 4 out of 100", "out of 100"),
        ("final score 4", "is not in the answer"),
        ("Score: 4", "is not in the answer"),
    ],
)
def test_no_score(text: str, says: str) -> None:
    with pytest.raises(NoScore, match=says):
        read_score(text, PUBLISHED, (1.0, 5.0))


@pytest.mark.parametrize("written", ["nan", "inf", "-inf", "1e999", "four", ""])
def test_what_a_loose_pattern_lets_through_is_no_score(written: str) -> None:
    with pytest.raises(NoScore, match=r"not finite|no number"):
        read_score(f"score={written};", re.compile("score=(.*);"), None)


def test_an_optional_group_that_is_absent_is_no_score() -> None:
    with pytest.raises(NoScore, match="None is no number"):
        read_score("score=", re.compile(r"score=(\d)?"), None)


def test_a_loose_scale_takes_any_number() -> None:
    assert read_score("score=-12.5;", re.compile("score=(.*);"), None) == -12.5


def test_an_answer_cut_after_its_score_keeps_it() -> None:
    body = completion("Final Score: 4. The cat is", "length")
    assert read_score(read_answer(body), PUBLISHED, (1.0, 5.0)) == 4.0
    body = completion("Final Score: 4.", "length")
    with pytest.raises(NoScore, match="cut off at max_tokens"):
        read_score(read_answer(body), PUBLISHED, (1.0, 5.0))


def test_an_image_of_the_right_size_is_sent_untouched() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    sent = Image.open(BytesIO(base64.b64decode(image_url(image, 16).partition(",")[2])))
    assert np.array_equal(np.asarray(sent), image)
