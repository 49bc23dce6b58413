"""The shipped scorers read rendered words, and read them the same whatever is beside them."""

import random
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from quickstart.words import prompt_of
from reward_servers.ocr.detection import in_rows
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
        ("nope", {}, "no scorer 'nope'; valid: .*ocr, ocr_tesseract"),
        ("ocr", {"width": 96}, "width"),
        ("ocr", {"input_width": 97}, "multiple"),
        ("ocr_tesseract", {"text_height": "high"}, "text_height"),
        ("ocr", {"match": "fuzzy"}, "args: match: Input should be 'contained' or 'exact'"),
        ("ocr_tesseract", {"match": "fuzzy"}, "args: match: Input should be 'contained' or 'exact'"),
        ("ocr", {"detect": True, "input_width": 96}, "input_width is for images of one line"),
        ("ocr", {"detect_side": 256}, "detect_side would do nothing"),
        ("ocr", {"detect": True, "detect_side": 100}, "detect_side.*multiple of 32"),
        ("ocr_tesseract", {"page": "auto"}, "args: page: Input should be 'line', 'block' or 'sparse'"),
    ],
)
def test_bad_arguments(name: str, args: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_scorer(name, args)


def test_a_fixed_input_width_is_kept(words: tuple[list[str], NDArray[np.uint8]]) -> None:
    scorer = load_scorer("ocr", {"input_width": 128})
    assert np.mean([item.score for item in scorer.score(call_of(*words))]) > 0.93


Page = tuple[list[str], NDArray[np.uint8]]
"""Lines, and their image."""


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def page_of(lines: list[str], width: int, height: int, size: int, tilt: float = 0.0) -> Page:
    """Centred lines, dark on light."""
    image = Image.new("RGB", (width, height), (236, 228, 210))
    draw = ImageDraw.Draw(image)
    for index, line in enumerate(lines):
        y = height / 2 + (index - len(lines) / 2 + 0.5) * 1.6 * size
        draw.text((width / 2, y), line, font=font(size), fill=(40, 20, 60), anchor="mm")
    return lines, np.array(image.rotate(tilt, Image.Resampling.BICUBIC, fillcolor=(236, 228, 210)))


@pytest.fixture(scope="module")
def pages() -> list[Page]:
    return [
        page_of(["GRAND", "OPENING", "TODAY"], 256, 256, 32),
        page_of(["Fresh coffee", "and warm bread", "served all day", "until 22:00"], 512, 512, 40),
        page_of(["MIND THE GAP"], 512, 256, 48),
        page_of(["Keep calm", "and carry on"], 384, 384, 44, tilt=6.0),
        page_of(["no parking", "between 8 and 18", "residents only", "zone 4B", "thank you"], 512, 384, 32),
    ]


def sign_in_a_scene() -> Page:
    """A small sign, off centre, before blotches and discs."""
    lines, sign = page_of(["OWDU", "FJ99", "Z8XW"], 220, 160, 28)
    rng = random.Random(2)
    blotches = np.random.default_rng(2).integers(60, 220, (6, 6, 3), np.uint8)
    scene = Image.fromarray(blotches).resize((512, 512), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(scene)
    for _ in range(6):
        x, y, radius = rng.randrange(512), rng.randrange(512), rng.randrange(10, 45)
        draw.circle((x, y), radius, fill=(rng.randrange(256), rng.randrange(256), rng.randrange(256)))
    scene.paste(Image.fromarray(sign), (250, 60))
    return lines, np.array(scene)


def call_of_pages(pages: list[Page]) -> ScoreCall:
    prompts = [f'a poster that says "{" ".join(lines)}"' for lines, _ in pages]
    return ScoreCall([image for _, image in pages], prompts, [{}] * len(pages))


@pytest.fixture(scope="module")
def page_reader() -> OcrScorer:
    scorer = load_scorer("ocr", {"detect": True, "match": "exact"})
    scorer.warm_up()
    assert isinstance(scorer, OcrScorer)
    return scorer


def test_pages_are_read_line_by_line_in_order(page_reader: OcrScorer, pages: list[Page]) -> None:
    items = page_reader.score(call_of_pages(pages))
    assert [item.details["text"].split("\n") for item in items] == [lines for lines, _ in pages]
    assert [item.score for item in items] == [1.0] * len(pages)
    assert "PP-OCRv6_det_small" in page_reader.model and "PP-OCRv6_rec_small" in page_reader.model


def test_without_detection_a_page_is_not_read(pages: list[Page]) -> None:
    scorer = load_scorer("ocr", {"match": "exact"})
    assert np.mean([item.score for item in scorer.score(call_of_pages(pages[:2]))]) < 0.5
    assert isinstance(scorer, OcrScorer)
    with pytest.raises(ValueError, match="detect: true"):
        scorer.read_pages([pages[0][1]])


def test_a_sign_in_a_scene_is_found(page_reader: OcrScorer) -> None:
    lines, image = sign_in_a_scene()
    assert page_reader.read_pages([image]) == ["\n".join(lines)]


def test_words_side_by_side_are_one_row(page_reader: OcrScorer) -> None:
    left, right = page_of(["LEFT", "LOWER"], 256, 256, 36), page_of(["RIGHT", "CORNER"], 256, 256, 36)
    image = np.concatenate([left[1], right[1]], axis=1)
    assert page_reader.read_pages([image]) == ["LEFT RIGHT\nLOWER CORNER"]


def test_large_pages_are_reduced_for_detection_only(page_reader: OcrScorer) -> None:
    lines, image = page_of(["A WIDE POSTER", "seen from afar"], 1400, 900, 110)
    assert page_reader.read_pages([image]) == ["\n".join(lines)]


def test_pages_without_text_score_zero_and_tiny_ones_do_no_harm(page_reader: OcrScorer) -> None:
    blank = [np.full((*size, 3), 200, np.uint8) for size in ((256, 256), (9, 60), (80, 20), (1, 1))]
    items = page_reader.score(ScoreCall(blank, ['"word"'] * 4, [{}] * 4))
    assert [(item.score, item.details["text"]) for item in items] == [(0.0, "")] * 4


def test_detection_is_batch_invariant_to_the_bit(page_reader: OcrScorer, pages: list[Page]) -> None:
    assert page_reader.batch_invariant
    # Hard to read, so that a change of the last bits would show in the text.
    blurred = [
        (lines, np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius))))
        for (lines, image), radius in ((pages[2], 8), (pages[0], 4))
    ]
    mixed = [pages[0], *blurred]
    together = list(page_reader.score(call_of_pages(mixed)))
    assert any(0.0 < (item.score or 0.0) < 1.0 for item in together)
    assert together == [page_reader.score(call_of_pages([page]))[0] for page in mixed]
    assert together == list(page_reader.score(call_of_pages(mixed[::-1])))[::-1]


def test_the_network_is_batch_invariant_at_the_widths_of_lines() -> None:
    scorer = load_scorer("ocr")
    assert isinstance(scorer, OcrScorer)
    lines = list(np.random.default_rng(1).integers(0, 256, (6, 40, 300, 3), np.uint8))
    together = scorer.run_network(lines, 384)
    assert np.array_equal(scorer.run_network([lines[3]], 384)[0], together[3])
    assert np.array_equal(scorer.run_network(lines[::-1], 384)[::-1], together)


def test_boxes_of_a_tilted_row_stay_in_one_row() -> None:
    def box(x: float, y: float) -> NDArray[np.float32]:
        return np.array([[x, y], [x + 80, y], [x + 80, y + 30], [x, y + 30]], np.float32)

    rows = in_rows([box(200, 24), box(0, 0), box(100, 12), box(0, 50), box(100, 62)])
    assert [[float(found[0, 0]) for found in row] for row in rows] == [[0, 100, 200], [0, 100]]


@pytest.mark.parametrize("name", NAMES)
def test_extra_text_costs_under_the_exact_rule(name: str) -> None:
    _, image = page_of(["KIOSKXYZ"], 256, 48, 30)
    call = ScoreCall([image], ['a sign that says "KIOSK"'], [{}])
    assert load_scorer(name).score(call)[0].score == 1.0
    assert load_scorer(name, {"match": "exact"}).score(call)[0].score == pytest.approx(0.4)


@pytest.mark.parametrize("page", ["block", "sparse"])
def test_tesseract_reads_pages(page: str, pages: list[Page]) -> None:
    scorer = load_scorer("ocr_tesseract", {"page": page, "match": "exact"})
    chosen = [pages[index] for index in (0, 1, 2, 4)]
    scores = [item.score for item in scorer.score(call_of_pages(chosen))]
    assert np.mean(scores) > 0.95
    assert list(scorer.score(call_of_pages(chosen[::-1])))[::-1] == list(scorer.score(call_of_pages(chosen)))


def test_tesseract_takes_a_page_for_one_line_unless_told(pages: list[Page]) -> None:
    scorer = load_scorer("ocr_tesseract", {"match": "exact"})
    assert np.mean([item.score for item in scorer.score(call_of_pages(pages[:2]))]) < 0.5


def test_tesseract_finds_a_sign_in_a_scene() -> None:
    (item,) = load_scorer("ocr_tesseract", {"page": "sparse"}).score(call_of_pages([sign_in_a_scene()]))
    assert (item.score or 0.0) > 0.9


def test_an_image_that_tesseract_does_not_take_fails_alone() -> None:
    """A line of pixels is a quarter of a million wide once it is enlarged."""
    thin = np.zeros((1, 4096, 3), np.uint8)
    blank = np.full((32, 64, 3), 255, np.uint8)
    scorer = load_scorer("ocr_tesseract")
    first, failed, last = scorer.score(ScoreCall([blank, thin, blank], ['"a"'] * 3, [{}] * 3))
    assert failed.score is None and "4096 x 1 pixels" in (failed.error or "")
    assert first == last and first.error is None
