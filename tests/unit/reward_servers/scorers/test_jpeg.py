"""The size of a JPEG file, as a reward."""

from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from reward_servers.scorers import load_scorer
from reward_servers.wire import ScoreCall


def images() -> list[NDArray[np.uint8]]:
    """Flat, a ramp, noise: worse and worse to compress. The last has another size."""
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None], (64, 64, 3))
    noise = np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8)
    return [np.full((64, 64, 3), 90, np.uint8), np.array(ramp), noise]


def call_of(chosen: list[NDArray[np.uint8]]) -> ScoreCall:
    return ScoreCall(chosen, [""] * len(chosen), [{}] * len(chosen))


def bytes_of(image: NDArray[np.uint8], quality: int) -> int:
    file = BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality)
    return len(file.getvalue())


def test_the_published_scales() -> None:
    sizes = [bytes_of(image, 95) for image in images()]
    worse = load_scorer("jpeg").score(call_of(images()))
    assert [item.score for item in worse] == [size / 1000 for size in sizes]
    assert [item.details for item in worse] == [{"bytes": size} for size in sizes]
    better = load_scorer("jpeg", {"rule": "compressibility"}).score(call_of(images()))
    assert [item.score for item in better] == [-(size / 1000) / 500 for size in sizes]


def test_noise_is_larger_than_flat() -> None:
    scores = [item.score or 0.0 for item in load_scorer("jpeg").score(call_of(images()))]
    assert scores[0] < scores[1] < scores[2]


def test_quality_is_used() -> None:
    (item,) = load_scorer("jpeg", {"quality": 60}).score(call_of(images()[2:]))
    assert item.score == bytes_of(images()[2], 60) / 1000 < bytes_of(images()[2], 95) / 1000


def test_batch_invariant_and_needs_no_prompt() -> None:
    scorer = load_scorer("jpeg")
    scorer.warm_up()
    together = scorer.score(call_of(images()))
    assert list(together) == [scorer.score(call_of([image]))[0] for image in images()]
    assert scorer.batch_invariant and scorer.check("", {}) is None


def test_read_only_images_are_taken() -> None:
    """The binary body gives views of the request."""
    image = images()[2]
    image.flags.writeable = False
    assert load_scorer("jpeg").score(call_of([image]))[0].score


def test_an_image_that_jpeg_cannot_hold_is_an_error_not_a_score() -> None:
    (item, good) = load_scorer("jpeg").score(call_of([np.zeros((1, 65501, 3), np.uint8), images()[0]]))
    assert item.score is None and "65501 x 1" in (item.error or "")
    assert good.score


@pytest.mark.parametrize(("args", "says"), [({"rule": "small"}, "rule"), ({"quality": 0}, "quality")])
def test_bad_arguments(args: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_scorer("jpeg", args)
