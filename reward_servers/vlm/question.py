"""What a vision-language judge is asked: published judges, the text, the image.

Promises
- A prompt is put into the template as it is; braces in either mean nothing.
"""

from __future__ import annotations

import base64
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reward_servers.wire import encode_png

PROMPT_MARK: Final = "{prompt}"
"""What the template has in place of the prompt."""

_UNIFIED_TASK: Final = (
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this "
    "image based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider "
    "the accuracy of depicted objects, their relationships, and attributes as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\n"
    "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)
_UNIFIED: Final[dict[str, Any]] = {
    "score_pattern": r"Final Score:\s*([1-5](?:\.\d+)?)",
    "score_range": (1.0, 5.0),
    "divide_by": 5.0,
    "image_size": 512,
}
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "unified_reward": {
        **_UNIFIED,
        "model": "CodeGoat24/UnifiedReward-7b-v1.5",
        # The published client writes the image mark itself, although it sends the image beside the text.
        "prompt_template": "<image>\n" + _UNIFIED_TASK,
    },
    "unified_reward_qwen": {
        **_UNIFIED,
        "model": "CodeGoat24/UnifiedReward-qwen-7b",
        "prompt_template": _UNIFIED_TASK,
    },
}
"""Arguments of the `vlm_judge` scorer for published judges, in (0.2, 1) after the division.

UnifiedReward (arXiv 2503.05236): task, pattern and image size as Flow-GRPO and DGPO call it on SGLang
(`--chat-template chatml-llava`), which is where published numbers come from. The Qwen2.5-VL port runs on vLLM
and gives other scores. UnifiedReward 2.0 answers with three scores and has no preset.
"""


def question(template: str, prompt: str) -> str:
    """The text that goes beside the image.

    >>> question('{"caption": "{prompt}"}', "a {red} cat")
    '{"caption": "a {red} cat"}'
    """
    return template.replace(PROMPT_MARK, prompt)


def image_url(image: NDArray[np.uint8], size: int | None) -> str:
    """The image as a data URL of a PNG file.

    Args:
        image: (H, W, 3) RGB.
        size: side of the square it is resized to, bicubic and without regard to its aspect, as the published
            clients do; None sends it as it is.
    """
    if size is not None and image.shape[:2] != (size, size):
        image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode("ascii")
