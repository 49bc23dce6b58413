"""Bytes of images to a scorer that costs nothing: through Serve's proxy, and to one server alone.

All images of a run go through the one proxy of the Serve that it starts, once for each reward.
"""

from __future__ import annotations

import statistics
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.reward_servers import Load, Served, alone, ray_serve, replicas
from benchmarks.timed_scorer import TIMED

GROUP: Final = 24
PIXELS: Final = 512
CLIENTS: Final = 2
SETTLING_S: Final = 2.0


def proxy(passes: int, pass_s: float) -> dict[str, Any]:
    """MB/s of both, of groups of 24 images of 512 x 512."""
    images = np.random.default_rng(0).integers(0, 256, (GROUP, PIXELS, PIXELS, 3), np.uint8)
    arguments = {"image_s": 0.0, "max_batch": GROUP}
    with ray_serve(cpus=2) as base, replicas(base, TIMED, arguments, {"num_replicas": 2}) as served:
        rows = {"Ray Serve, its proxy": _rates(served, images, passes, pass_s)}
    with alone(TIMED, arguments) as served:
        rows["uvicorn"] = _rates(served, images, passes, pass_s)
    return {"images": GROUP, "pixels": PIXELS, "clients": CLIENTS, "passes": passes, "rows": rows}


def _rates(served: Served, images: NDArray[np.uint8], passes: int, pass_s: float) -> dict[str, float]:
    with Load(served, CLIENTS, images, "p") as load:
        load.measure(SETTLING_S)
        rates = [load.measure(pass_s)[0] * images[0].nbytes for _ in range(passes)]
    return {"bytes_s": statistics.median(rates), "min": min(rates), "max": max(rates)}
