"""OCR accuracy by the recogniser of PP-OCRv6 (small), ONNX, as it lies in the rapidocr wheel (Apache-2).

For images that hold one line of text: they are resized to the network's input as a whole. With `detect`, for
text somewhere in a picture, lines are found first (ocr/detection.py), and all lines of all images are read in
the same batches. A picture that is read as one line all the same is warned of, once.
Formula and details: ocr/accuracy.py.

Promises
- Batch-invariant to the bit: the network always runs on `BATCH` images of one size, short batches padded.
  (onnxruntime picks other kernels for a batch of one, which moves the last bits.)
- One request at a time on `threads` threads that sleep while they wait: it shares the machine.

Preprocessing, of PaddleOCR: BGR, bilinear to 48 pixels high, (x / 255 - 0.5) / 0.5; greedy CTC decoding,
index 0 is the blank, the space comes last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from pydantic import Field, model_validator

from reward_servers.ocr.accuracy import Match, missing_target, score_text
from reward_servers.ocr.detection import TextDetector, cut_out
from reward_servers.ocr.single_line import LineWatch
from reward_servers.protocol import Metadata
from reward_servers.scorer import ItemScore, Scorer, ScorerOptions
from reward_servers.wire import Images, ScoreCall

HEIGHT: Final = 48
"""Input height, fixed in the network."""
BATCH: Final = 8
"""Images the network always runs on. Measured: 4 to 32 cost the same an image, one costs 10 % more."""


class OcrOptions(ScorerOptions):
    """Arguments of the `ocr` scorer."""

    input_width: int | None = Field(default=None, ge=16, le=1024, multiple_of=8)
    """Width that images are resized to; null follows each image's aspect (32 x 64 pixels: 96)."""
    model_path: Path | None = None
    """Another PP-OCR recogniser with its dictionary in the metadata key `character`."""
    match: Match = "contained"
    """`contained`: the published rule, extra text is free; `exact`: extra text costs."""
    detect: bool = False
    """Find the lines of text of an image and read each; else an image is one line."""
    detect_side: int = Field(default=512, ge=64, le=2048, multiple_of=32)
    """Longer side that larger images are reduced to for finding lines, pixels. Never enlarged."""

    @model_validator(mode="after")
    def _one_line_or_many(self) -> OcrOptions:
        if self.detect and self.input_width is not None:
            raise ValueError("input_width is for images of one line: leave it null with detect")
        if not self.detect and "detect_side" in self.model_fields_set:
            raise ValueError("detect_side would do nothing without detect: true")
        return self


def create(args: dict[str, Any], threads: int) -> OcrScorer:
    return OcrScorer(OcrOptions.model_validate(args), threads)


class OcrScorer(Scorer):
    name = "ocr"
    version = "1"
    batch_invariant = True
    threaded = True
    max_batch = 64

    def __init__(self, options: OcrOptions, threads: int) -> None:
        self.options = options
        path = options.model_path or _wheel_model("PP-OCRv6_rec_small.onnx")
        self.model = f"{path.stem} (rapidocr {version('rapidocr')})"
        self._width = options.input_width
        self._match: Match = options.match
        self._session = _session(path, threads)
        self._input = self._session.get_inputs()[0].name
        listed = self._session.get_modelmeta().custom_metadata_map.get("character")
        if listed is None:
            raise ValueError(f"{path}: no recogniser: its metadata has no key 'character' with a dictionary")
        self._characters = ["", *listed.splitlines(), " "]
        self._lines = LineWatch(self.name, "detect: true")
        self._detector: TextDetector | None = None
        if options.detect:
            found = _wheel_model("PP-OCRv6_det_small.onnx")
            self._detector = TextDetector(_session(found, threads), options.detect_side)
            self.model = f"{found.stem}, {self.model}"

    def check(self, prompt: str, metadata: Metadata) -> str | None:
        return missing_target(prompt)

    def score(self, call: ScoreCall) -> Sequence[ItemScore]:
        if self._detector is None:
            self._lines.look(call.images)
            texts = self.read(call.images)
        else:
            texts = self.read_pages(call.images)
        return [
            score_text(text, prompt, self._match) for text, prompt in zip(texts, call.prompts, strict=True)
        ]

    def warm_up(self) -> None:
        blank = [np.full((32, 64, 3), 255, np.uint8)]
        self.read(blank)
        if self._detector is not None:
            self.read_pages(blank)

    def read_pages(self, images: Images) -> list[str]:
        """The text in each image, rows from top to bottom, one a line; empty where none was found.

        Needs the option `detect`.
        """
        if self._detector is None:
            raise ValueError("scorer 'ocr' was made without detect: true, so it has no detector")
        pages = [self._detector.rows(image) for image in images]
        crops = [
            cut_out(image, box, HEIGHT)
            for image, page in zip(images, pages, strict=True)
            for row in page
            for box in row
        ]
        texts = iter(self.read(crops))
        return ["\n".join(" ".join(next(texts) for _ in row) for row in page) for page in pages]

    def read(self, images: Images) -> list[str]:
        """The text in each image of one line."""
        by_width: dict[int, list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            by_width[self._width or _aspect_width(image)].append(index)
        texts = [""] * len(images)
        for width, indices in by_width.items():
            for start in range(0, len(indices), BATCH):
                chosen = indices[start : start + BATCH]
                scores = self.run_network([images[index] for index in chosen], width)
                for index, best in zip(chosen, scores.argmax(axis=2), strict=True):
                    texts[index] = self._decode(best)
        return texts

    def run_network(self, images: Images, width: int) -> NDArray[np.float32]:
        """(len(images), steps, characters) probabilities of at most BATCH images."""
        batch = np.zeros((BATCH, 3, HEIGHT, width), np.float32)
        for row, image in zip(batch, images, strict=False):
            row[:] = cv2.resize(image, (width, HEIGHT))[..., ::-1].transpose(2, 0, 1)
        batch /= np.float32(255)
        batch -= np.float32(0.5)
        batch /= np.float32(0.5)
        scores: NDArray[np.float32] = self._session.run(None, {self._input: batch})[0]
        return scores[: len(images)]

    def _decode(self, best: NDArray[np.int64]) -> str:
        """CTC: repeated indices are one character, blanks are none."""
        changed = np.concatenate([[True], best[1:] != best[:-1]])
        return "".join(self._characters[index] for index in best[changed])


def _aspect_width(image: NDArray[np.uint8]) -> int:
    """The width that keeps the aspect at HEIGHT, a multiple of 16 so that few sizes occur."""
    height, width = image.shape[:2]
    return int(np.clip(round(HEIGHT * width / height / 16), 1, 64)) * 16


def _session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads would take the cores from rollout and learner between two requests.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of kinds that have no base of their own
        raise ValueError(f"{path}: no ONNX network could be loaded from it: {error}") from error


def _wheel_model(name: str) -> Path:
    # The package is located, not imported: importing it loads its whole pipeline.
    spec = find_spec("rapidocr")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("scorer 'ocr' needs the package rapidocr: pip install rapidocr")
    path = Path(spec.submodule_search_locations[0]) / "models" / name
    if not path.is_file():
        raise RuntimeError(f"scorer 'ocr': {path} is missing; it comes with rapidocr >= 3.10")
    return path
