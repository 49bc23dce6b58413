"""How long clients of reward servers and judges wait before they ask again."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from tenacity import RetryCallState, wait_exponential

from reward_servers.exchange import Transient


def asked_and_backoff(
    multiplier: float, longest_s: float, *, within_s: float = math.inf
) -> Callable[[RetryCallState], float]:
    """Seconds until the next attempt: what Retry-After asks for, and exponential backoff with jitter.

    The jitter is on top of what was asked for: all clients that were shed come back at different times.

    Args:
        within_s: of the first attempt; a pause ends before, unless what was asked for does not.
    """
    longest = wait_exponential(multiplier=multiplier, max=longest_s)

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after_s if isinstance(error, Transient) else 0.0
        left = within_s - (state.seconds_since_start or 0.0) - asked
        return asked + random.uniform(0.0, min(longest(state), max(left, 0.0)))

    return wait
