"""Objects in images by Mask2Former (Swin-S, COCO instances), as GenEval's evaluation finds them with mmdet.

Promises
- Resizing and post-processing are mmdet's, re-made: what its test pipeline and `MaskFormerFusionHead`
  compute. Padding is that of the weights, Meta's: zeros after normalising. mmdet's own configuration (2.25
  and later) pads with grey 128 before it normalises, which Meta's network has never seen.
  An image: bilinear (OpenCV) to a shorter side of 800, a longer one of at most 1333; ImageNet's mean and
  deviation; then zeros below and right to a multiple of 32.
  A network's output: softmax over classes, the null class dropped; the 100 most probable pairs of query and
  class; mask logits bilinear to the padded size, cut, bilinear to the image's size; mask where they are above
  0; confidence = class probability x mean of sigmoid(logit) over the mask; box = tight around the mask.
  Nothing is suppressed for overlapping.
- Output that is not finite is told as such, never as an image without objects.

What differs from GenEval's evaluation is the weights: `facebook/mask2former-swin-small-coco-instance` is the
same architecture from another training run (Meta's, not mmdet's `mask2former_swin-s-p4-w7-224_lsj_8x2_50e_
coco`), so scores are comparable among themselves, and only roughly with published tables.

The processor of transformers is not used: it stretches images to a multiple of 32 instead of padding them,
resizes with Pillow's filter, and its `post_process_instance_segmentation` passes masks through 384 x 384,
drops confidences below 0.5 and gives every pixel to one object only.

Source: GenEval (arXiv 2310.11513); mmdetection, `configs/mask2former` and `maskformer_fusion_head.py`;
Mask2Former (arXiv 2112.01527).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import Mask2FormerConfig, Mask2FormerModel, Mask2FormerPreTrainedModel

from reward_servers.geneval.classes import CLASSES
from reward_servers.geneval.rules import Detection
from reward_servers.networks.loading import NeuralOptions, batches, load_network
from reward_servers.wire import Images

STRIDE: Final = 32
"""Input sides are multiples of it."""
MAX_PAIRS: Final = 100
"""Pairs of query and class that are looked at."""


# Of ImageNet, RGB, 0..255.
_MEAN: Final = np.array([123.675, 116.28, 103.53], np.float32)
_STD: Final = np.array([58.395, 57.12, 57.375], np.float32)


class Size(NamedTuple):
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class Found:
    """An object and its pixels. Compared by identity."""

    detection: Detection
    mask: NDArray[np.bool_]
    """(H, W) of the image."""


class InstanceNetwork(Mask2FormerPreTrainedModel):  # type: ignore[misc]
    """`Mask2FormerForUniversalSegmentation` without its loss, which cannot be made without scipy."""

    _keys_to_ignore_on_load_unexpected = (r"criterion\.",)

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(N, queries, classes + 1) and (N, queries, h, w) logits of the last decoder layer."""
        output = self.model(pixel_values=pixel_values, output_hidden_states=True, return_dict=True)
        queries = output.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        return self.class_predictor(queries), output.masks_queries_logits[-1]


class Mask2FormerDetector:
    """A network in the format of transformers with COCO's 80 classes.

    Args:
        source: local directory or hub id.
        short_side: that the shorter side of an image is resized to.
        long_side: at most, of the longer side.
    """

    def __init__(
        self, source: str, options: NeuralOptions, *, short_side: int = 800, long_side: int = 1333
    ) -> None:
        self._network = load_network(InstanceNetwork, source, options)
        labels = self._network.config.num_labels
        if labels != len(CLASSES):
            raise ValueError(
                f"{source}: detects {labels} classes; expected the {len(CLASSES)} of COCO instances, as "
                "facebook/mask2former-swin-small-coco-instance has them"
            )
        self._options = options
        self._sides = (short_side, long_side)

    def find(self, images: Images, min_score: float = 0.0) -> list[list[Found] | None]:
        """The objects of each image that are more confident than `min_score`; None where the network's output
        is not finite.

        Args:
            images: RGB, each (H, W, 3).
        """
        by_size: dict[Size, list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            by_size[resized_size(Size(*image.shape[:2]), *self._sides)].append(index)
        found: list[list[Found] | None] = [None] * len(images)
        for resized, indices in by_size.items():
            for chosen in batches(indices, self._options.max_batch):
                pixels = torch.stack([network_pixels(images[index], resized) for index in chosen])
                classes, masks = self._run(pixels)
                padded = Size(*pixels.shape[-2:])
                for index, class_logits, mask_logits in zip(chosen, classes, masks, strict=True):
                    if class_logits.isfinite().all() and mask_logits.isfinite().all():
                        original = Size(*images[index].shape[:2])
                        found[index] = instances(
                            class_logits, mask_logits, padded, resized, original, min_score
                        )
        return found

    @torch.inference_mode()
    def _run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(N, queries, classes + 1) and (N, queries, h, w) float32 logits."""
        on_device = pixels.to(device=self._options.device, dtype=self._options.torch_dtype)
        classes, masks = self._network(on_device)
        return classes.float(), masks.float()


def resized_size(size: Size, short_side: int, long_side: int) -> Size:
    """The size that an image is resized to, its aspect kept.

    >>> resized_size(Size(512, 512), 800, 1333), resized_size(Size(256, 1024), 800, 1333)
    (Size(height=800, width=800), Size(height=333, width=1333))
    """
    scale = min(long_side / max(size), short_side / min(size))
    return Size(*(max(1, int(side * scale + 0.5)) for side in size))


def network_pixels(image: NDArray[np.uint8], resized: Size) -> Tensor:
    """(3, height, width) float32, normalised, padded to a multiple of STRIDE."""
    height, width = (-(-side // STRIDE) * STRIDE for side in resized)
    padded = np.zeros((height, width, 3), np.float32)
    pixels = cv2.resize(image, (resized.width, resized.height), interpolation=cv2.INTER_LINEAR)
    padded[: resized.height, : resized.width] = (pixels - _MEAN) / _STD
    return torch.from_numpy(padded).permute(2, 0, 1)


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    padded: Size,
    resized: Size,
    original: Size,
    min_score: float = 0.0,
) -> list[Found]:
    """What a network's output says is in one image, in no order.

    Args:
        class_logits: (queries, classes + 1) float32, the null class last.
        mask_logits: (queries, h, w) float32, over the padded image.
        padded: size of the network's input.
        resized: the part of it that is image.
        original: size of the image.
        min_score: only what is more confident.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    classes = probabilities.shape[1]
    top = probabilities.flatten().topk(min(MAX_PAIRS, probabilities.numel()))
    # The mask's mean is at most 1: what is not probable enough now never will be.
    hopeful = top.indices[top.values > min_score]
    found = []
    for pair in hopeful.tolist():
        query, label = divmod(pair, classes)
        logits = _to_original(mask_logits[query], padded, resized, original)
        mask = logits > 0
        area = mask.sum()
        score = float(probabilities[query, label] * (logits.sigmoid() * mask).sum() / (area + 1e-6))
        if score > min_score and area > 0:
            detection = Detection(CLASSES[label], score, _tight_box(mask))
            found.append(Found(detection, mask.cpu().numpy()))
    return found


def _to_original(logits: Tensor, padded: Size, resized: Size, original: Size) -> Tensor:
    """One mask, (h, w) to the original size; interpolated twice, as mmdet does."""
    whole = interpolate(logits[None, None], padded, mode="bilinear", align_corners=False)
    part = whole[..., : resized.height, : resized.width]
    return interpolate(part, original, mode="bilinear", align_corners=False)[0, 0]


def _tight_box(mask: Tensor) -> tuple[float, float, float, float]:
    """The right and lower edges are behind the last pixel."""
    columns, rows = mask.any(0).nonzero().flatten(), mask.any(1).nonzero().flatten()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def crop(image: NDArray[np.uint8], found: Found, background: Sequence[int]) -> NDArray[np.uint8]:
    """(h, w, 3) the object's box, with `background` where its mask is not."""
    x1, y1, x2, y2 = map(int, found.detection.box)
    part = np.s_[y1:y2, x1:x2]
    composed: NDArray[np.uint8] = np.where(
        found.mask[part][..., None], image[part], np.array(background, np.uint8)
    )
    return composed
