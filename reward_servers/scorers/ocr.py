"""OCR accuracy by the recogniser of PP-OCRv6 (small), ONNX, as it lies in the rapidocr wheel (Apache-2).

For images that hold one line of text: they are resized to the network's input as a whole, without a
detector. Formula and details: text_accuracy.py.

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
from pydantic import Field

from reward_servers.protocol import Metadata
from reward_servers.scorer import ItemScore, Scorer, ScorerOptions
from reward_servers.text_accuracy import missing_target, score_text
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


def create(args: dict[str, Any], threads: int) -> OcrScorer:
    return OcrScorer(OcrOptions.model_validate(args), threads)


class OcrScorer(Scorer):
    name = "ocr"
    version = "1"
    batch_invariant = True
    max_batch = 64

    def __init__(self, options: OcrOptions, threads: int) -> None:
        path = options.model_path or _wheel_model()
        self.model = f"{path.stem} (rapidocr {version('rapidocr')})"
        self._width = options.input_width
        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads = threads
        session_options.inter_op_num_threads = 1
        # Spinning threads would take the cores from rollout and learner between two requests.
        session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            str(path), session_options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        listed = self._session.get_modelmeta().custom_metadata_map["character"].splitlines()
        self._characters = ["", *listed, " "]

    def check(self, prompt: str, metadata: Metadata) -> str | None:
        return missing_target(prompt)

    def score(self, call: ScoreCall) -> Sequence[ItemScore]:
        texts = self.read(call.images)
        return [score_text(text, prompt) for text, prompt in zip(texts, call.prompts, strict=True)]

    def warm_up(self) -> None:
        self.read([np.full((32, 64, 3), 255, np.uint8)])

    def read(self, images: Images) -> list[str]:
        """The text in each image."""
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


def _wheel_model() -> Path:
    # The package is located, not imported: importing it loads its whole pipeline.
    spec = find_spec("rapidocr")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("scorer 'ocr' needs the package rapidocr: pip install rapidocr")
    path = Path(spec.submodule_search_locations[0]) / "models" / "PP-OCRv6_rec_small.onnx"
    if not path.is_file():
        raise RuntimeError(f"scorer 'ocr': {path} is missing; it comes with rapidocr >= 3.10")
    return path
