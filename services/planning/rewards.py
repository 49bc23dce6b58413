"""What a reward costs: seconds of one replica an image, and memory of its network.

Measured figures say where; those of networks on a GPU are arithmetic from their published sizes and assume
how fast float32 is. `dgpo reward bench` and `dgpo reward score` measure yours: give it with --reward-seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.config import Config, RewardConfig
from services.config_file import ConfigError

FLOAT32_SHARE = 0.1
"""Of the rate of bfloat16 that a GPU reaches with the float32 networks of scorers: assumed."""
GIB_OF = {
    "geneval": 1.9,
    "pickscore": 3.7,
    "hpsv2": 3.7,
    "imagereward": 1.7,
    "aesthetic": 1.6,
    "clipscore": 1.6,
}
"""Of scorers whose network may be on a GPU, in float32 (docs/rewards.md)."""
CLIP_H, CLIP_L = 380e9, 170e9
"""FLOPs of an image and its prompt, parameters of the towers times tokens: 2 x (632 M x 257 + 354 M x 77)
of CLIP H/14, 2 x (304 M x 257 + 85 M x 77) of L/14."""
FLOP_OF = {
    # Mask2Former with Swin-S at 800 x 1333 (its paper: 313 G multiply-adds), four crops through CLIP L/14.
    "geneval": 2 * 313e9 + 4 * CLIP_L,
    "pickscore": CLIP_H,
    "hpsv2": CLIP_H,
    "imagereward": 2 * (304e6 * 257 + 110e6 * 35),
    "aesthetic": CLIP_L,
    "clipscore": CLIP_L,
}
LINE_S = {
    "ocr": (0.0032, "8 x 16 images in 0.405 s, one thread: `dgpo reward bench`, docs/rewards.md"),
    "ocr_tesseract": (0.0036, "one core: reward_servers/scorers/ocr_tesseract.py"),
    "shapes": (0.0004, "one core: reward_servers/scorers/shapes.py"),
}
"""Seconds of a CPU thread, measured."""
DETECT_S = (
    0.30,
    "by hand, not by a bench: CPU seconds of one thread, a 512 x 512 picture with one sign, two busy virtual "
    "cores of an AMD EPYC, 26 November 2026",
)


@dataclass(frozen=True)
class RewardCost:
    """Of one reward of a run."""

    name: str
    seconds: float | None
    """Of one replica an image; None: unknown."""
    on_gpu: bool
    share: float
    """Of the groups that are scored: a held-out reward may look at some only."""
    source: str


def reward_gib(reward: RewardConfig) -> float:
    """Of a replica on a GPU; 0 of others."""
    return GIB_OF.get(reward.app or "", 0.0) if reward.num_gpus else 0.0


def reward_costs(config: Config, rate: float, given: Mapping[str, float]) -> tuple[RewardCost, ...]:
    """Every reward of a run.

    Args:
        rate: FLOP/s of a GPU in bfloat16.
        given: reward name -> seconds of one replica an image, in place of what is known.

    Raises:
        ConfigError: seconds are given for a reward that the recipe does not have.
    """
    names = [reward.name for reward in config.rewards]
    if stranger := sorted(set(given) - set(names)):
        raise ConfigError(
            f"--reward-seconds {stranger[0]}: the recipe has no such reward, only {', '.join(names)}"
        )
    return tuple(_cost(reward, rate, given) for reward in config.rewards)


def _cost(reward: RewardConfig, rate: float, given: Mapping[str, float]) -> RewardCost:
    app, seconds, source = reward.app or "", None, "unknown: counted as 0, give --reward-seconds"
    if reward.name in given:
        seconds, source = given[reward.name], "given"
    elif app == "ocr" and reward.args.get("detect"):
        seconds, source = DETECT_S
    elif app in LINE_S and not reward.args.get("page"):
        seconds, source = LINE_S[app]
    elif app in FLOP_OF and reward.num_gpus:
        seconds = FLOP_OF[app] / (rate * FLOAT32_SHARE)
        source = (
            f"arithmetic: {FLOP_OF[app] / 1e12:.2f} TFLOP at {rate * FLOAT32_SHARE / 1e12:g} TFLOP/s, assumed"
        )
    return RewardCost(reward.name, seconds, reward.num_gpus > 0, 1 / reward.every, source)
