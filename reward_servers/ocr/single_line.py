"""Images that are said to hold one line of text, and clearly hold something else.

A reader of single lines squeezes a whole picture to the height of a line. It gives a score all the same, near
0 whatever is written there.
"""

from __future__ import annotations

import logging
from typing import Final

from reward_servers.wire import Images

log = logging.getLogger(__name__)

HIGHEST: Final = 128
"""Pixels; lower images may be a line of any aspect, such as 32 x 64."""
LEAST_ASPECT: Final = 2.0
"""Width by height; of higher images a line is wider."""


class LineWatch:
    """Warns once in the life of a scorer.

    Args:
        remedy: the argument that reads pictures.
    """

    def __init__(self, scorer: str, remedy: str) -> None:
        self._scorer = scorer
        self._remedy = remedy
        self._warned = False

    def look(self, images: Images) -> None:
        """Warn where an image is no line."""
        if self._warned:
            return
        for image in images:
            height, width = image.shape[:2]
            if height > HIGHEST and width < LEAST_ASPECT * height:
                self._warned = True
                log.warning(
                    "scorer %r reads images as one line of text each, but one has %d x %d pixels; for text "
                    "somewhere in a picture give it the argument %s",
                    self._scorer,
                    width,
                    height,
                    self._remedy,
                    extra={"reward": self._scorer},
                )
                return
