"""What integration tests share: one small Ray on loopback."""

import os
from collections.abc import Iterator

import pytest
import ray

# Ray's workers inherit the environment of the moment in which Ray starts.
os.environ["DGPO_TEST_REWARD_TOKEN"] = "a-token-for-tests-only"


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A Ray of four (logical) CPUs on loopback, for the whole test session."""
    # Ray's workers are nice (15) by default: beside anything else they would get next to no time.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=200 * 1024**2,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
