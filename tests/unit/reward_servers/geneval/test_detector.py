"""The detector against transformers' own network and the published steps around it in a few lines."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import Mask2FormerForUniversalSegmentation

from reward_servers.geneval.classes import CLASSES
from reward_servers.geneval.detector import (
    Found,
    InstanceNetwork,
    Mask2FormerDetector,
    Size,
    crop,
    instances,
    network_pixels,
    resized_size,
)
from reward_servers.geneval.rules import Detection
from reward_servers.networks.loading import NeuralOptions, load_network
from tests.pickled_weights import pickle_weights
from tests.unit.reward_servers.geneval.tiny_mask2former import QUERIES, new_mask2former
from tests.unit.reward_servers.networks.tiny_clip import photos

SHORT, LONG = 64, 100
SIZES = ((64, 64), (40, 50), (128, 31), (75, 90))


@pytest.fixture(scope="module")
def detector(detector_folder: Path) -> Mask2FormerDetector:
    return Mask2FormerDetector(str(detector_folder), NeuralOptions(), short_side=SHORT, long_side=LONG)


def key(found: Found) -> tuple[str, tuple[float, ...]]:
    return found.detection.name, found.detection.box


def by_steps(network: Mask2FormerForUniversalSegmentation, image: NDArray[np.uint8]) -> list[Found]:
    """mmdet's resizing, Meta's padding, the detector and mmdet's instance post-processing, for one image."""
    height, width = image.shape[:2]
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    h, w = int(height * scale + 0.5), int(width * scale + 0.5)
    mean, deviation = np.float32([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])
    pixels = (cv2.resize(image, (w, h)) - mean) / deviation
    pixels = np.pad(pixels, [(0, -h % 32), (0, -w % 32), (0, 0)])
    with torch.no_grad():
        output = network(pixel_values=torch.from_numpy(pixels).permute(2, 0, 1)[None])
    scores = output.class_queries_logits[0].softmax(-1)[:, :-1].flatten()
    best = scores.topk(100).indices
    masks = interpolate(output.masks_queries_logits, pixels.shape[:2], mode="bilinear")[..., :h, :w]
    masks = interpolate(masks, (height, width), mode="bilinear")[0][best // 80]
    inside = (masks > 0).float()
    means = (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    found = []
    for pair, mask, mean in zip(best, inside.bool().numpy(), means, strict=True):
        if mask.any():
            (ys, xs), name = np.nonzero(mask), CLASSES[int(pair) % 80]
            box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            found.append(Found(Detection(name, float(scores[pair] * mean), box), mask))
    return found


@pytest.mark.parametrize("size", SIZES)
def test_finds_what_the_published_steps_find(
    detector: Mask2FormerDetector, mask2former: Mask2FormerForUniversalSegmentation, size: tuple[int, int]
) -> None:
    image = photos(size)[0]
    (found,) = detector.find([image])
    expected = {key(one): one for one in by_steps(mask2former, image)}
    assert found is not None
    assert len(expected) > 60 and len({one.detection.box for one in found}) >= QUERIES / 2
    assert {key(one) for one in found} == set(expected)
    for one in found:
        assert one.detection.score == pytest.approx(expected[key(one)].detection.score, rel=1e-3)
        assert np.array_equal(one.mask, expected[key(one)].mask)
        assert one.mask.shape == size


def test_the_network_is_transformers_own(
    detector_folder: Path, mask2former: Mask2FormerForUniversalSegmentation
) -> None:
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    network = load_network(InstanceNetwork, str(detector_folder), NeuralOptions())
    with torch.no_grad():
        classes, masks = network(pixels)
        expected = mask2former(pixel_values=pixels)
    torch.testing.assert_close(classes, expected.class_queries_logits)
    torch.testing.assert_close(masks, expected.masks_queries_logits)
    assert classes.shape == (2, QUERIES, 81) and classes.std() > 0.5


def test_images_of_several_sizes_in_one_call(detector: Mask2FormerDetector) -> None:
    images = photos(*SIZES, SIZES[0])
    together = detector.find(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = detector.find([image])
        assert found is not None and alone is not None
        expected = {key(one): one.detection.score for one in alone}
        assert {key(one): one.detection.score for one in found} == pytest.approx(expected, rel=1e-3)


def test_the_least_score_only_leaves_out(detector: Mask2FormerDetector) -> None:
    (image,) = photos((64, 64))
    (every,), (sure,) = detector.find([image]), detector.find([image], min_score=0.1)
    assert every is not None and sure is not None
    expected = [one.detection for one in every if one.detection.score > 0.1]
    assert [one.detection for one in sure] == expected
    assert 0 < len(expected) < len(every)


def test_output_that_is_not_finite_is_no_empty_image(detector_folder: Path) -> None:
    detector = Mask2FormerDetector(str(detector_folder), NeuralOptions(), short_side=64)
    with torch.no_grad():
        detector._network.class_predictor.bias[3] = float("nan")
    assert detector.find(photos((64, 64))) == [None]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (800, 800)),
        ((480, 640), (800, 1067)),
        ((256, 1024), (333, 1333)),
        ((1024, 1024), (800, 800)),
        ((1, 4000), (1, 1333)),
    ],
)
def test_resized_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(Size(*size), 800, 1333) == expected


def test_pixels_are_rgb_normalised_and_padded_with_zeros() -> None:
    red = np.zeros((20, 30, 3), np.uint8)
    red[..., 0] = 255
    pixels = network_pixels(red, Size(40, 60))
    assert pixels.shape == (3, 64, 64)
    assert pixels[:, 39, 59].tolist() == pytest.approx(
        [(255 - 123.675) / 58.395, -116.28 / 57.12, -103.53 / 57.375]
    )
    assert not pixels[:, 40:].any() and not pixels[:, :, 60:].any()


def output(*queries: dict[int, float], height: int = 16, width: int = 16) -> tuple[Tensor, Tensor]:
    """Logits of queries that know the given classes, without a mask."""
    classes = torch.full((len(queries), 81), -100.0)
    for query, logits in enumerate(queries):
        for label, logit in logits.items():
            classes[query, label] = logit
    return classes, torch.full((len(queries), height, width), -5.0)


def look(classes: Tensor, masks: Tensor, side: int = 64, original: int = 64) -> list[Found]:
    return instances(classes, masks, Size(64, 64), Size(side, side), Size(original, original), 0.01)


def test_confidence_is_class_probability_times_mean_mask_probability() -> None:
    # Probabilities: 0.75 a cup, 0.25 nothing.
    classes, masks = output({41: float(np.log(3)), 80: 0.0})
    masks[0, 4:8, 8:12] = 5.0
    (found,) = look(classes, masks)
    assert found.detection.name == "cup"
    whole = interpolate(masks[None], (64, 64), mode="bilinear")[0, 0].double()
    mean = (1 / (1 + (-whole[whole > 0]).exp())).mean()
    assert found.detection.score == pytest.approx(0.75 * float(mean), rel=1e-5)
    assert 0.6 < found.detection.score < 0.74
    assert found.detection.box == (32, 16, 48, 32)
    assert found.mask.sum() == found.mask[16:32, 32:48].sum() > 200


def test_one_query_may_be_two_objects_and_overlap_is_kept() -> None:
    classes, masks = output({41: 0.0, 45: 0.0}, {41: 0.0})
    masks[:, 2:14, 2:14] = 5.0
    names = sorted(found.detection.name for found in look(classes, masks))
    assert names == ["bowl", "cup", "cup"]


def test_the_null_class_is_no_object() -> None:
    classes, masks = output({80: 0.0})
    masks[:] = 5.0
    assert look(classes, masks) == []


def test_an_empty_mask_is_no_object() -> None:
    assert look(*output({41: 0.0})) == []


def test_only_the_hundred_most_probable_pairs_are_looked_at() -> None:
    logits = dict.fromkeys(range(80), 0.0)
    classes, masks = output(logits, {label: 1.0 if label < 30 else 0.0 for label in range(80)})
    masks[:] = 5.0
    found = look(classes, masks)
    assert len(found) == 100
    assert sum(one.detection.score > 1.5 / 80 for one in found) == 30


def test_masks_in_the_padding_are_cut_away() -> None:
    classes, masks = output({41: 0.0}, {45: 0.0})
    masks[0, 12:, :] = 5.0
    masks[1, :6, :6] = 5.0
    (found,) = look(classes, masks, side=40, original=80)
    # 6 of 16 over 64 is 24 of 40, or 48 of 80.
    assert found.detection.name == "bowl"
    assert found.detection.box == (0, 0, 48, 48)


def test_a_crop_shows_the_object_only() -> None:
    image = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    mask = np.zeros((6, 8), np.bool_)
    mask[2, 3] = mask[4, 5] = True
    cut = crop(image, Found(Detection("cup", 1.0, (3, 2, 6, 5)), mask), (9, 9, 9))
    assert cut.shape == (3, 3, 3) and cut.dtype == np.uint8
    assert np.array_equal(cut[0, 0], image[2, 3]) and np.array_equal(cut[2, 2], image[4, 5])
    assert (np.delete(cut.reshape(9, 3), [0, 8], axis=0) == 9).all()


def test_a_detector_of_other_classes_is_refused(tmp_path: Path) -> None:
    new_mask2former(labels=133).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="detects 133 classes; expected the 80 of COCO instances"):
        Mask2FormerDetector(str(tmp_path), NeuralOptions())


def test_a_pickled_detector_is_refused(detector_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(detector_folder, tmp_path / "pickled")
    pickle_weights(folder)
    with pytest.raises(ValueError, match=r"no file named model\.safetensors"):
        Mask2FormerDetector(str(folder), NeuralOptions())


def test_another_network_is_refused(clip_folder: Path) -> None:
    with pytest.raises(ValueError):
        Mask2FormerDetector(str(clip_folder), NeuralOptions())


def test_the_classes_are_cocos() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert [CLASSES[index] for index in (0, 41, 64, 65, 66, 79)] == [
        "person",
        "cup",
        "computer mouse",
        "tv remote",
        "computer keyboard",
        "toothbrush",
    ]
