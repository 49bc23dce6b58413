"""Reads words back with the recogniser that gives the reward, without a server: for pretraining and tests.

Promises
- The reward is the published formula: 1 - min(Levenshtein, len) / len, 1 where the target is contained,
  spaces removed and lower case on both sides. `exact` asks for the whole text to be the word.
"""

from pathlib import Path
from typing import Final, NamedTuple

import cv2
import numpy as np
import onnxruntime
import rapidocr
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein

INPUT_SIZE: Final = (96, 48)
"""Width and height that the recogniser is given."""
BATCH_SIZE: Final = 16


class Reading(NamedTuple):
    """How well a set of images could be read."""

    reward: float
    exact: float


class Recognizer:
    """PP-OCRv6 (small), as it lies in the rapidocr wheel."""

    def __init__(self, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        path = Path(rapidocr.__file__).parent / "models" / "PP-OCRv6_rec_small.onnx"
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        listed = self._session.get_modelmeta().custom_metadata_map["character"].splitlines()
        # Index 0 is the CTC blank; the space is not listed and comes last.
        self._characters = ["", *listed, " "]

    def read(self, images: NDArray[np.uint8]) -> list[str]:
        """The text in each of `images` (N, H, W, 3), RGB."""
        texts: list[str] = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = np.stack([_prepare(image) for image in images[start : start + BATCH_SIZE]])
            for scores in self._session.run(None, {self._input: batch})[0]:
                texts.append(self._decode(scores.argmax(axis=1)))
        return texts

    def score(self, images: NDArray[np.uint8], words: list[str]) -> Reading:
        """Mean reward and share of exact matches of `images` (N, H, W, 3) against `words`."""
        texts = [text.replace(" ", "").lower() for text in self.read(images)]
        wanted = [word.lower() for word in words]
        rewards = [reward_of(text, word) for text, word in zip(texts, wanted, strict=True)]
        exact = [text == word for text, word in zip(texts, wanted, strict=True)]
        return Reading(float(np.mean(rewards)), float(np.mean(exact)))

    def _decode(self, best: NDArray[np.int64]) -> str:
        """CTC: repeated indices are one character, blanks are none."""
        changed = np.concatenate([[True], best[1:] != best[:-1]])
        return "".join(self._characters[index] for index in best[changed])


def reward_of(text: str, word: str) -> float:
    """The published OCR reward of one text, both without spaces and lower case.

    >>> reward_of("k7qx", "k7qx"), reward_of("k7q", "k7qx"), reward_of("", "k7qx")
    (1.0, 0.75, 0.0)
    """
    if word in text:
        return 1.0
    return 1.0 - min(Levenshtein.distance(text, word), len(word)) / len(word)


def _prepare(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    bgr = cv2.resize(np.ascontiguousarray(image[..., ::-1]), INPUT_SIZE)
    scaled: NDArray[np.float32] = (np.asarray(bgr, dtype=np.float32) / 255.0 - 0.5) / 0.5
    return scaled.transpose(2, 0, 1)
