"""Prompts that ask for text in an image, the text between double quotes as the OCR scorers read it.

Promises
- The list is a pure function of its seed; with the default seed it is the suite `ocr`, the same in every
  release. Its prompts are this project's own, so scores on it are comparable with each other and not with
  published ones; those are of other lists, which can be given as files.
- As many prompts of each length of the text, tagged by it; no text twice.
"""

from __future__ import annotations

import random
from typing import Final

from services.messages import Prompt

SEED: Final = 1
PROMPTS_A_LENGTH: Final = 75
LENGTHS: Final = (1, 2, 3, 4)
"""Words of a text."""

_SCENES: Final = (
    'a shop window with a painted sign that says "{}"',
    'a wooden signpost on a mountain trail that reads "{}"',
    'a chalkboard outside a café with "{}" written on it',
    'a neon sign glowing "{}" above a rainy street at night',
    'the cover of an old book titled "{}", lying on a desk',
    'a white coffee mug printed with "{}", on a kitchen table',
    'a birthday cake with "{}" in icing',
    'a billboard beside a desert highway that says "{}"',
    'a close-up of a metal plaque engraved with "{}"',
    'a cardboard box with "{}" stamped on its side',
    'a protest banner held by a crowd that reads "{}"',
    'a movie poster with the title "{}" in bold letters',
    'graffiti of "{}" on a brick wall',
    'a T-shirt on a hanger with "{}" across the chest',
    'a train station board that shows "{}"',
    'a handwritten note that says "{}", pinned to a corkboard',
    'a bottle label that reads "{}", in a row of bottles',
    'a flag on a sailing boat with "{}" sewn onto it',
    'a museum ticket printed with "{}"',
    'a child\'s drawing of a house with "{}" above the door',
)
_TEXT: Final = """
Amber Anchor April Autumn Bakery Bamboo Bicycle Blossom Bright Bridge Candle Castle Cedar Circus
Clover Copper Coral Corner Cotton Crystal Daily Desert Dragon Dream Early Echo Ember Evening Falcon
Feather Festival Forest Fresh Frozen Garden Gentle Ginger Golden Grand Harbor Harvest Hidden Honey
Horizon Island Ivory Jasmine Journey Jungle Kettle Kingdom Lantern Lemon Library Little Lucky Lunar
Maple Marble Market Meadow Midnight Mirror Morning Mountain Museum Mystic Nectar Night North Ocean
Olive Open Orange Orchard Paper Parade Pepper Pilot Planet Pocket Quiet Rainbow River Robin Rocket
Royal Saffron Sailor Secret Shadow Silver Simple Sky Spice Spring Station Storm Summer Sunset Temple
Thunder Tiger Tower Travel Tulip Valley Velvet Village Violet Wander Water Wild Willow Winter Wonder
Yellow Young Zebra
"""
_WORDS: Final = tuple(_TEXT.split())


def written_text_prompts(seed: int = SEED, prompts_a_length: int = PROMPTS_A_LENGTH) -> list[Prompt]:
    """Prompts with metadata {tag}: "1 word", "2 words", ..."""
    rng = random.Random(f"dgpo/written text/{seed}")
    prompts: dict[str, Prompt] = {}
    for length in LENGTHS:
        tag = f"{length} word{'s' if length > 1 else ''}"
        while len(prompts) < length * prompts_a_length:
            text = " ".join(rng.sample(_WORDS, length))
            scene = rng.choice(_SCENES)
            prompts.setdefault(text, Prompt(text=scene.format(text), metadata={"tag": tag}))
    return list(prompts.values())
