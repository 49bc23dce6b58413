"""Image files scored against a prompt, in this process or by a server (`dgpo reward score`).

Promises
- In this process the scorer runs in the engine that serves it: the same batches, checks and deadline.
- A file that is no image, or leaves open what it shows (transparency, several pictures, more than 8 bits), is
  refused. One that says how it was held is turned upright.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from reward_servers.client import RewardClient, RewardUnavailable
from reward_servers.engine import ScoringEngine
from reward_servers.protocol import Metadata
from reward_servers.scorer import ItemScore
from reward_servers.scorers import load_scorer
from reward_servers.wire import Images, ScoreCall


def read_image(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) RGB of an image file.

    Raises:
        ValueError: it cannot be read, or leaves open what it shows.
    """
    try:
        with Image.open(path) as image:
            transparent, mode = image.has_transparency_data, image.mode
            animated = getattr(image, "is_animated", False)
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:
        # Pillow raises what its decoders meet: all of it means that this is no image.
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error
    if transparent:
        raise ValueError(f"{path}: has transparency: lay it over a background first")
    if animated:
        raise ValueError(f"{path}: holds several pictures: give one")
    if mode.startswith(("I", "F")):
        # Pillow would cut its values off at 255.
        raise ValueError(f"{path}: has more than 8 bits a channel (mode {mode}): bring it to 8 first")
    return pixels


def score_here(
    app: str,
    args: dict[str, Any],
    threads: int,
    images: Images,
    prompt: str,
    metadata: Metadata,
    deadline_s: float,
) -> tuple[dict[str, Any], list[ItemScore]]:
    """What scored, and an item an image.

    Raises:
        ValueError: there is no such scorer, or it can never score this.
        ProtocolError: as a server would answer.
    """
    scorer = load_scorer(app, args, threads)
    if reason := scorer.check(prompt, metadata):
        raise ValueError(reason)

    async def run() -> list[ItemScore]:
        engine = ScoringEngine(scorer, merge=False, deadline_s=deadline_s, max_pending=1)
        await engine.start()
        try:
            return await engine.score(ScoreCall(images, [prompt] * len(images), [metadata] * len(images)))
        finally:
            await engine.stop()

    items = asyncio.run(run())
    return {"reward": app, "model": scorer.model, "version": scorer.full_version}, items


def score_by_server(
    url: str,
    token: str | None,
    images: Sequence[NDArray[np.uint8]],
    prompt: str,
    metadata: Metadata,
    deadline_s: float,
    *,
    waits: Callable[[str], None] | None = None,
    authority: str | None = None,
) -> tuple[dict[str, Any], list[ItemScore]]:
    """What scored, and an item an image; a request for each size of image.

    Args:
        waits: a server that nobody can connect to is asked until the deadline, and this is told why; None: it
            is an error at once.
        authority: certificates to trust beside the system's, PEM; for https.

    Raises:
        ValueError: `url` is none.
        RewardError: there is no finite score for every image.
    """
    by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        by_size[image.shape].append(index)
    client = RewardClient("score", url, token, deadline_s, authority=authority)
    items: dict[int, ItemScore] = {}
    result: dict[str, Any] = {}

    async def ask() -> None:
        try:
            if why := client.unreachable():
                if waits is None:
                    raise RewardUnavailable(
                        client.name, client.url, f"nothing answers there ({why}); --wait waits for it"
                    )
                waits(f"nothing answers at {client.url} ({why})")
            for indices in by_size.values():
                stacked = np.stack([images[index] for index in indices])
                scored = await client.score_async(stacked, prompt, metadata)
                result.update(url=client.url, model=scored.model, version=scored.version)
                for index, value, details in zip(indices, scored.scores, scored.details, strict=True):
                    items[index] = ItemScore(value, details)
        finally:
            await client.aclose()
            client.close()

    asyncio.run(ask())
    return result, [items[index] for index in range(len(images))]
