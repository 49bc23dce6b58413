"""How long clients of reward servers and judges wait before they ask again."""

from __future__ import annotations

from collections.abc import Callable

from tenacity import RetryCallState, wait_random_exponential

from reward_servers.exchange import Transient


def asked_and_backoff(multiplier: float, longest_s: float) -> Callable[[RetryCallState], float]:
    """Seconds until the next attempt: what Retry-After asks for, and exponential backoff with jitter.

    The jitter is on top of what was asked for: all clients that were shed come back at different times.
    """
    backoff = wait_random_exponential(multiplier=multiplier, max=longest_s)

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after_s if isinstance(error, Transient) else 0.0
        return asked + backoff(state)

    return wait
