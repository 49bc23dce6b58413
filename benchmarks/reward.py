"""What reward servers cost and bear: `dgpo reward bench [PART]...`.

- throughput: a scorer behind HTTP, asked by 8 clients, against its batch function called in a loop, in turns;
  for a server alone (uvicorn) and for one replica on Ray Serve, proxy and all.
- bodies: the safetensors body against JSON with base64 PNG, in bytes and in time, both ways.
- proxy: bytes of images a second through Serve's proxy and to a server alone, to a scorer that costs nothing.
- scaling: a scorer that waits 50 ms an image, on Serve replicas that follow the load from 1 to N and back.
- division: a group in one request, or in several at once, on replicas that are alike or not, with our router
  and with two of Serve's.
- overload: requests at 4 times what the server can do, each sent once; then some of those that were shed,
  through the client, which comes back.

Clients, server and proxy share this machine. Ratios are medians of neighbouring passes: other work comes and
goes.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from benchmarks.reward_division import division
from benchmarks.reward_overload import overload
from benchmarks.reward_proxy import proxy
from benchmarks.reward_scaling import scaling
from benchmarks.reward_servers import Load, Served, alone, ray_serve, replicas
from benchmarks.reward_tables import print_tables
from benchmarks.timed_scorer import TIMED
from quickstart.render import render
from quickstart.words import prompt_of, train_word
from reward_servers.protocol import JSON_TYPE, SCORE_PATH, TENSOR_TYPE, Limits
from reward_servers.scorers import load_scorer
from reward_servers.wire import (
    ScoreCall,
    decode_json,
    decode_tensors,
    encode_json,
    encode_tensors,
)

PARTS: Final = ("throughput", "bodies", "proxy", "scaling", "division", "overload")
CLIENTS: Final = 8
GROUP: Final = 16
"""Images of a request: those of one group."""
TARGET: Final = 0.85
"""Share of the direct rate that a server must reach."""
_SETTLING_S: Final = 2.0


def run_reward_bench(
    screen: Console | None = None,
    *,
    parts: tuple[str, ...] = PARTS,
    requests: int = 10_000,
    most: int = 4,
    passes: int = 9,
    pass_s: float = 3.0,
    image_s: float = 0.05,
) -> dict[str, Any]:
    """Each of `parts`.

    Args:
        requests: of the overload.
        most: replicas of the scaling, at most, and of the division.
        passes: of each side of a comparison; groups of the division.
        pass_s: seconds of one pass.
        image_s: seconds that the scorer of these two waits an image.

    Returns:
        Part -> what was measured; `met` where there is a target.
    """
    result: dict[str, Any] = {"benchmark": "reward"}
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "throughput": lambda: throughput(passes, pass_s),
        "bodies": lambda: bodies(passes),
        "proxy": lambda: proxy(passes, pass_s),
        "scaling": lambda: scaling(most, image_s, pass_s),
        "division": lambda: division(most, image_s, passes),
        "overload": lambda: overload(requests),
    }
    for part in parts:
        result[part] = run[part]()
    if screen is not None:
        print_tables(result, screen)
    return result


def throughput(passes: int, pass_s: float) -> dict[str, Any]:
    """OCR on a CPU thread, over HTTP against in a loop; images a second."""
    call = _words(GROUP)
    images, prompts = np.stack(call.images), list(call.prompts)
    scorer = load_scorer("ocr")
    scorer.warm_up()

    def direct() -> float:
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < pass_s:
            scorer.score(call)
            count += len(call)
        return count / (time.perf_counter() - started)

    def compare(served: Served) -> dict[str, Any]:
        pairs, latencies = [], list[float]()
        for _ in range(passes):
            floor = direct()
            with Load(served, CLIENTS, images, prompts) as load:
                load.measure(_SETTLING_S)
                rate, took = load.measure(pass_s)
            pairs.append((floor, rate))
            latencies += took
        ratios = [rate / floor for floor, rate in pairs]
        return {
            "direct_images_s": statistics.median(floor for floor, _ in pairs),
            "served_images_s": statistics.median(rate for _, rate in pairs),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "p50_s": float(np.percentile(latencies, 50)),
            "p99_s": float(np.percentile(latencies, 99)),
            "target": TARGET,
            "met": statistics.median(ratios) >= TARGET,
        }

    with alone("ocr", {}) as served:
        rows = {"uvicorn": compare(served)}
    with ray_serve(cpus=2) as base, replicas(base, "ocr", {}, {"num_replicas": 1}) as served:
        rows["Ray Serve"] = compare(served)
    return {"clients": CLIENTS, "images": GROUP, "rows": rows}


def bodies(passes: int) -> dict[str, Any]:
    """Both forms of one request: bytes, and seconds to make, to read, and to be answered by a server."""
    sets = {"words 32x64": np.stack(_words(GROUP).images), "photos 512x512": _photographs(GROUP)}
    rows: dict[str, Any] = {}
    with alone(TIMED, {"image_s": 0.0, "max_batch": GROUP}) as served, served.session() as session:

        def measure(
            kind: str, encode: Callable[[], bytes], decode: Callable[[bytes, Limits], ScoreCall]
        ) -> dict[str, Any]:
            body = encode()

            def post() -> None:
                session.post(SCORE_PATH, content=body, headers={"Content-Type": kind}).raise_for_status()

            return {
                "bytes": len(body),
                "encode_s": _median_seconds(encode, passes),
                "decode_s": _median_seconds(lambda: decode(body, Limits()), passes),
                "answered_s": _median_seconds(post, passes),
            }

        for name, images in sets.items():
            rows[name] = {
                "safetensors": measure(TENSOR_TYPE, partial(encode_tensors, images, "p"), decode_tensors),
                "json": measure(JSON_TYPE, partial(encode_json, list(images), "p"), decode_json),
            }
    return {"images": GROUP, "rows": rows}


def _median_seconds(work: Callable[[], object], passes: int) -> float:
    seconds = []
    for _ in range(max(5, passes)):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _words(count: int) -> ScoreCall:
    """Words as the quickstart renders them, 32 x 64."""
    rng = random.Random(0)
    words = [train_word(rng) for _ in range(count)]
    return ScoreCall([render(word, rng) for word in words], [prompt_of(word) for word in words], [{}] * count)


def _photographs(count: int) -> NDArray[np.uint8]:
    """(count, 512, 512, 3). Smooth shapes under a little noise: to PNG they are much like photographs."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        smooth = np.asarray(coarse.resize((512, 512), Image.Resampling.BICUBIC), np.float32)
        images.append(np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8))
    return np.stack(images)
