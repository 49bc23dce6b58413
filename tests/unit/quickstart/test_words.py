import random

from hypothesis import given
from hypothesis import strategies as st

from quickstart.words import (
    CHARACTERS,
    WORD_LENGTH,
    english_words,
    heldout_words,
    is_heldout,
    prompt_of,
    train_word,
)


@given(st.integers(0, 2**32))
def test_training_words_are_never_held_out(seed: int) -> None:
    rng = random.Random(seed)
    words = [train_word(rng) for _ in range(20)]
    assert not any(is_heldout(word) for word in words)
    assert all(len(word) == WORD_LENGTH and set(word) <= set(CHARACTERS) for word in words)


def test_heldout_words_are_held_out_distinct_and_the_same_for_a_seed() -> None:
    words = heldout_words(500, seed=3)
    assert all(is_heldout(word) for word in words)
    assert len(set(words)) == 500
    assert words[:100] == heldout_words(100, seed=3)
    assert words != heldout_words(500, seed=4)


def test_both_sides_have_english_and_random_words() -> None:
    rng = random.Random(0)
    english = set(english_words())
    for words in (heldout_words(400, seed=0), [train_word(rng) for _ in range(400)]):
        assert 0.02 < sum(word in english for word in words) / len(words) < 0.25


def test_english_words_belong_to_the_prompt_space() -> None:
    assert all(len(word) == WORD_LENGTH and set(word) <= set(CHARACTERS) for word in english_words())


def test_a_prompt_quotes_its_word() -> None:
    assert prompt_of("K7QX") == 'a sign that says "K7QX"'
