"""The shipped scorers read rendered words, and read them the same whatever is beside them."""

import numpy as np
import pytest
from numpy.typing import NDArray

from quickstart.words import prompt_of
from reward_servers.scorer import ItemScore, Scorer
from reward_servers.scorers import load_scorer, scorer_names
from reward_servers.scorers.ocr import OcrScorer
from reward_servers.wire import ScoreCall

NAMES = ("ocr", "ocr_tesseract")


@pytest.fixture(scope="module", params=NAMES)
def scorer(request: pytest.FixtureRequest) -> Scorer:
    loaded = load_scorer(request.param)
    loaded.warm_up()
    return loaded


def call_of(words: list[str], images: NDArray[np.uint8]) -> ScoreCall:
    return ScoreCall(list(images), [prompt_of(word) for word in words], [{}] * len(words))


def test_the_registry_lists_files() -> None:
    assert set(NAMES) <= set(scorer_names())


def test_a_scorer_is_named_after_its_file(scorer: Scorer) -> None:
    assert scorer.name in NAMES and scorer.model and scorer.version


def test_reads_rendered_words(scorer: Scorer, words: tuple[list[str], NDArray[np.uint8]]) -> None:
    items = scorer.score(call_of(*words))
    assert np.mean([item.score for item in items]) > 0.93
    assert np.mean([item.details["exact"] for item in items]) > 0.8


def test_does_not_read_the_wrong_word(scorer: Scorer, words: tuple[list[str], NDArray[np.uint8]]) -> None:
    chosen, images = words
    items = scorer.score(call_of(chosen[1:] + chosen[:1], images))
    assert np.mean([item.score for item in items]) < 0.5


def test_batch_invariant_to_the_bit(words: tuple[list[str], NDArray[np.uint8]], scorer: Scorer) -> None:
    assert scorer.batch_invariant
    chosen, images = words[0][:9], words[1][:9]
    together = scorer.score(call_of(chosen, images))
    alone = [
        scorer.score(call_of([word], image[None]))[0] for word, image in zip(chosen, images, strict=True)
    ]
    backwards = scorer.score(call_of(chosen[::-1], images[::-1]))[::-1]
    assert list(together) == alone == list(backwards)


def test_the_network_itself_is_batch_invariant(words: tuple[list[str], NDArray[np.uint8]]) -> None:
    """Texts may agree by luck: compare what the network puts out."""
    scorer = load_scorer("ocr")
    assert isinstance(scorer, OcrScorer)
    images = list(words[1][:13])
    together = scorer.run_network(images[:8], 96)
    for index, image in enumerate(images[:8]):
        assert np.array_equal(scorer.run_network([image, *images[8 : 8 + index % 5]], 96)[0], together[index])


def test_images_of_many_sizes(scorer: Scorer) -> None:
    blank = [np.full((height, width, 3), 200, np.uint8) for height, width in ((32, 64), (9, 60), (80, 20))]
    items = scorer.score(ScoreCall(blank, ['"word"'] * 3, [{}] * 3))
    assert [type(item) for item in items] == [ItemScore] * 3


def test_a_prompt_without_quotes_is_refused(scorer: Scorer) -> None:
    assert "double quotes" in (scorer.check("a cat", {}) or "")
    assert scorer.check('a "cat"', {}) is None


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("nope", {}, "no scorer 'nope'; valid: ocr, ocr_tesseract"),
        ("ocr", {"width": 96}, "width"),
        ("ocr", {"input_width": 97}, "multiple"),
        ("ocr_tesseract", {"text_height": "high"}, "text_height"),
    ],
)
def test_bad_arguments(name: str, args: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_scorer(name, args)


def test_a_fixed_input_width_is_kept(words: tuple[list[str], NDArray[np.uint8]]) -> None:
    scorer = load_scorer("ocr", {"input_width": 128})
    assert np.mean([item.score for item in scorer.score(call_of(*words))]) > 0.93
