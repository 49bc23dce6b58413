"""One reward as a Ray Serve application. For a Serve config file: `reward_servers.deployment:build`.

deploy/serve/rewards.yaml is such a file; what it says of the deployment `reward` overrides what is set here.

Promises
- A replica is ready once its scorer is warm; one whose scorer hangs fails its health check and is replaced.
- Overload is refused with 429 and Retry-After: by the replica, which says why, and by Serve beyond that. Its
  plain text becomes the same JSON body where its proxy is started as proxy.py says.
- A replica that is taken away is sent nothing more, and answers what it has within the reward's deadline.
- Arguments hold no secret (server_config.py): Serve shows them on its dashboard.
"""

from __future__ import annotations

from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray._common.network_utils import build_address
from ray.serve._private import replica
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY
from ray.serve.config import RequestRouterConfig
from ray.serve.deployment import Application, Deployment

from reward_servers.app import create_app
from reward_servers.router import FewestRequests
from reward_servers.server_config import ServerConfig

QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""Serve's logging: a line a request costs more than the HTTP around it."""


@serve.ingress()
class Reward:
    """A replica: the reward's application around one scorer."""

    def __init__(self, args: dict[str, Any]) -> None:
        _listen_on_the_nodes_address()
        self._app = create_app(ServerConfig.model_validate(args))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    def check_health(self) -> None:
        """Called by Serve; raising makes it replace this replica."""
        if stalled := self._app.state.engine.stalled:
            raise RuntimeError(stalled)


def _listen_on_the_nodes_address() -> None:
    """In a replica: its server for calls between deployments, of which there are none here, listens where Ray
    itself does and not on every interface: on loopback, where the run has started Ray.
    """
    bind = replica.add_port_to_grpc_server
    address = ray.util.get_node_ip_address()
    replica.add_port_to_grpc_server = lambda server, _: bind(server, build_address(address, 0))


def deployment_of(config: ServerConfig) -> Deployment:
    """The deployment of a reward with limits that follow from its configuration; not yet bound."""
    configured = serve.deployment(
        name="reward",
        # Wider than the replica's own bound, whose refusal has a body that says why. Serve counts a request
        # as queued while it looks for a replica, so a narrow bound would refuse requests that have a place.
        max_ongoing_requests=config.max_pending + 64,
        max_queued_requests=config.max_pending + 128,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        # HAProxy, where Serve is told to use it, does the routing and takes no router.
        request_router_config=RequestRouterConfig(
            **({} if RAY_SERVE_ENABLE_HA_PROXY else {"request_router_class": FewestRequests})
        ),
        health_check_period_s=10,
        health_check_timeout_s=30,
        # No request takes longer; one that waits for nothing is not waited for.
        graceful_shutdown_timeout_s=config.deadline_s,
        # A scorer that cannot be made will not be made on the 20th try, Serve's default, either.
        max_constructor_retry_count=2,
        logging_config=QUIET,
    )
    deployment: Deployment = configured(Reward)
    return deployment


def autoscaling(min_replicas: int, max_replicas: int) -> dict[str, Any]:
    """Serve's `autoscaling_config`: replicas by requests that are being scored or wait.

    The same as in deploy/serve/rewards.yaml. One being scored and one waiting keep a replica busy; more of
    them only wait longer.
    """
    return {
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "target_ongoing_requests": 2,
        "metrics_interval_s": 1,
        "look_back_period_s": 5,
        "upscale_delay_s": 5,
        # Rollout comes in waves: what was just warmed up is wanted again.
        "downscale_delay_s": 60,
    }


def build(args: dict[str, Any]) -> Application:
    """A Serve application from the `args` of a Serve config file: the fields of ServerConfig."""
    config = ServerConfig.model_validate(args)
    application: Application = deployment_of(config).bind(config.model_dump(mode="json"))
    return application
