"""The published formula, case by case."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_servers.ocr.accuracy import accuracy, normalised, score_text, target_of


@pytest.mark.parametrize(
    ("prompt", "text", "score", "exact"),
    [
        ('a sign that says "K7QX"', "K7QX", 1.0, 1),
        ('a sign that says "K7QX"', "k7qx", 1.0, 1),
        ('a sign that says "K7QX"', "K 7 Q\nX", 1.0, 1),
        ('a sign that says "K7QX"', "xxK7QXyy", 1.0, 0),
        ('a sign that says "K7QX"', "K7Q", 0.75, 0),
        ('a sign that says "K7QX"', "K7OX", 0.75, 0),
        ('a sign that says "K7QX"', "", 0.0, 0),
        ('a sign that says "K7QX"', "nothing of the kind", 0.0, 0),
        ('"two words" and "three"', "TwoWords", 1.0, 1),
        ('a "', "a", None, None),
        ('an empty ""', "a", None, None),
        ('a blank "  "', "a", None, None),
        ("no quotes", "no quotes", None, None),
    ],
)
def test_cases(prompt: str, text: str, score: float | None, exact: int | None) -> None:
    item = score_text(text, prompt)
    assert item.score == score
    if score is None:
        assert item.error is not None and "double quotes" in item.error
    else:
        assert item.details == {"text": text, "exact": exact}


@pytest.mark.parametrize(
    ("text", "contained", "exact"),
    [
        ("K7QX", 1.0, 1.0),
        ("k 7 q x", 1.0, 1.0),
        ("K7QXy", 1.0, 0.75),
        ("xxK7QXyy", 1.0, 0.0),
        ("xxxK7QXyyy", 1.0, 0.0),
        ("K7Q", 0.75, 0.75),
        ("K7OX", 0.75, 0.75),
        ("", 0.0, 0.0),
    ],
)
def test_exact_counts_extra_text(text: str, contained: float, exact: float) -> None:
    prompt = 'a sign that says "K7QX"'
    assert score_text(text, prompt, "contained").score == contained == score_text(text, prompt).score
    item = score_text(text, prompt, "exact")
    assert item.score == exact
    assert item.details == {"text": text, "exact": int(exact == 1.0)}


@given(text=st.text(max_size=12), target=st.text(min_size=1, max_size=6))
def test_exact_is_one_for_the_target_alone_and_never_more_than_contained(text: str, target: str) -> None:
    assert 0.0 <= accuracy(text, target, "exact") <= accuracy(text, target)
    assert (accuracy(text, target, "exact") == 1.0) == (text == target)


@given(text=st.text(max_size=12), target=st.text(min_size=1, max_size=6))
def test_between_nothing_and_one(text: str, target: str) -> None:
    assert 0.0 <= accuracy(text, target) <= 1.0
    assert accuracy(text + target, target) == 1.0


@given(st.text(max_size=12))
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)
    assert not any(character.isspace() for character in normalised(text))


def test_the_first_quoted_text_is_the_target() -> None:
    assert target_of('it says "One Two" not "three"') == "onetwo"
