"""Whether rollouts are shifted as the stock pipeline would shift images of their size.

FLUX's and Qwen-Image's shift follows from the number of image tokens, `rollout.shift` is a number: whoever
sets another size keeps the shift of the old one. It is told, not refused: every shift can be trained with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from policy.errors import PolicyError
from policy.packing import PATCH
from policy.registry import read_family
from policy.schedule import published_rollout
from services.config import Config
from services.config_file import find
from services.planning.published import MODELS, Published

SAME: Final = 1e-3
"""Relative: recipes have rounded shifts."""


def other_shift(config: Config) -> tuple[str, str] | None:
    """What to say of a shift that is not that of the size, and what to do about it; None: it is that, or
    nothing follows from the size.

    Reads configurations of a local model, and knows those of `published_models.json`; of another hub id
    nothing is known before it is loaded. Groups of a recording have been sampled already.
    """
    if config.offline:
        return None
    try:
        stock = _stock_shift(config)
    except PolicyError:
        return None  # it cannot be used, or steps as no rollout can: others say so
    shift, model = config.rollout.shift, config.model
    if stock is None or math.isclose(shift, stock, rel_tol=SAME):
        return None
    return (
        f"rollout.shift is {shift:g}, the stock pipeline's for images of {model.height} x {model.width} is "
        f"{stock:.4f} (it follows from the size)",
        f"set rollout.shift={stock:.4f}, unless another is meant",
    )


def _stock_shift(config: Config) -> float | None:
    """Of the size; None: it does not follow from it, or is not known."""
    model = config.model
    if find(model.path).is_dir():
        family, configs = read_family(model)
        if not configs.scheduler.get("use_dynamic_shifting"):
            return None
        return _shift(family.stock_rollout(model, configs))
    name = next((name for name, known in MODELS.items() if known["hub"] == model.path), None)
    if name is None:
        return None
    published = Published.named(name)
    if published.scheduler is None:
        return None
    rows, columns = published.grid(model.height, model.width)
    return _shift(
        published_rollout(
            published.scheduler, sigmas=published.family.sigmas, tokens=(rows // PATCH) * (columns // PATCH)
        )
    )


def _shift(rollout: Mapping[str, Any]) -> float:
    return float(rollout["shift"])
