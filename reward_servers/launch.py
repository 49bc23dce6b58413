"""Starts the rewards of a run on Ray Serve, one application each, and stops them.

Promises
- Binds loopback unless told otherwise, with a request timeout; one proxy, on this node.
- Returns when every reward answers /v1/info with its own name, or raises RewardsNotReady within the deadline,
  naming what is not ready and why.
- What a Serve of its own refuses has an ErrorBody, like what its rewards refuse (proxy.py).
- A Serve that already runs on this Ray cluster is used as it is, and left running at the end.

Ray must be initialised. The tokens' file must be readable where the replicas run.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import ApplicationStatus

from reward_servers.deployment import QUIET, autoscaling, deployment_of
from reward_servers.protocol import INFO_PATH, ServerInfo
from reward_servers.proxy import CALLBACK
from reward_servers.scorers import scorer_names
from reward_servers.server_config import ServerConfig, read_token
from services.config import RewardConfig

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_POLL_S = 0.2
_GRACE_S = 5.0
"""How much later than the replica Serve gives a request up, so that the replica's reason is what is seen."""

_started: list[str] = []
"""Applications of this process."""
_owns_serve = False


class RewardsNotReady(Exception):
    """Some rewards of the run did not become ready."""


def start_rewards(
    rewards: Sequence[RewardConfig],
    *,
    token_file: Path,
    port: int,
    deadline_s: float,
    host: str = LOOPBACK,
) -> dict[str, str]:
    """Serve every reward that has an `app`.

    Args:
        token_file: bearer token of all of them, mode 0600.
        port: 0 takes a free one.
        deadline_s: seconds until all must be ready.

    Returns:
        Reward name -> address, up to and without /v1. Rewards with a `url` are in it too, as they are.
    """
    addresses = {reward.name: reward.url.rstrip("/") for reward in rewards if reward.url is not None}
    served = [reward for reward in rewards if reward.app is not None]
    if not served:
        return addresses
    for reward in served:
        if reward.app not in scorer_names():
            raise ValueError(f"reward {reward.name!r}: no scorer {reward.app!r}; valid: {scorer_names()}")
    until = time.monotonic() + deadline_s
    token = read_token(token_file)
    targets = [_target(reward, token_file) for reward in served]
    # Serve tells of every step that it takes; whoever waits here shows progress of their own.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    owned = _owns_serve
    names = [target.name for target in targets]
    try:
        request_s = max(reward.deadline_s for reward in served) + _GRACE_S
        base = start_serve(host, port, deadline_s=deadline_s, request_timeout_s=request_s)
        _started.extend(names)
        serve.run_many(
            targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
        )
        addresses |= {reward.name: f"{base}/{reward.name}" for reward in served}
        _wait_ready(served, addresses, token, until, deadline_s)
    except BaseException:
        _stop(names, shutdown=_owns_serve and not owned)
        raise
    return {reward.name: addresses[reward.name] for reward in rewards}


def stop_rewards() -> None:
    """Stop what this process started by `start_rewards`; nothing if it started nothing."""
    _stop(list(_started), shutdown=_owns_serve)


def _stop(names: Sequence[str], *, shutdown: bool) -> None:
    global _owns_serve
    if ray.is_initialized():
        if shutdown:
            serve.shutdown()
        else:
            for name in names:
                serve.delete(name, _blocking=False)
    _started[:] = [name for name in _started if name not in names]
    _owns_serve = _owns_serve and not shutdown


def start_serve(host: str, port: int, *, deadline_s: float, request_timeout_s: float) -> str:
    """Start Serve unless it runs; `stop_rewards` ends what was started.

    Args:
        port: 0 takes a free one.
        request_timeout_s: seconds after which Serve gives a request up.

    Returns:
        The address of its proxy.

    Raises:
        RewardsNotReady: it did not start in time.
    """
    global _owns_serve
    running = _running_options()
    if running is None:
        running = HTTPOptions(
            host=host,
            port=port or _free_port(host),
            request_timeout_s=request_timeout_s,
        )
        # From here on there may be a controller to stop, whether or not the proxy comes up.
        _owns_serve = True
        try:
            serve.start(
                proxy_location=ProxyLocation.HeadOnly,
                http_options=running,
                logging_config=QUIET,
                controller_options=_environment(deadline_s),
            )
        except RayError as error:
            reason = str(error).strip().splitlines()
            raise RewardsNotReady(
                f"Ray Serve did not start on {running.host}:{running.port} within {deadline_s:g} s "
                f"({type(error).__name__}: {reason[-1] if reason else ''}); is the machine overloaded?"
            ) from error
    elif (running.host, running.port) != (host, port or running.port):
        log.warning("Serve already runs on %s:%s, and keeps that address", running.host, running.port)
    return f"http://{running.host}:{running.port}"


def _environment(deadline_s: float) -> dict[str, Any]:
    """Serve kills a proxy that is not up within 5 s, or silent for 10 s: too soon for a busy machine."""
    return {
        "runtime_env": {
            "env_vars": {
                "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(deadline_s),
                "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
                **CALLBACK,
            }
        }
    }


def _running_options() -> HTTPOptions | None:
    """HTTP options of the Serve that runs on this cluster, if one does."""
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    try:
        client = _get_global_client(raise_if_no_controller_running=True)
    except RayServeException:
        return None
    return None if client is None else client.http_config


def _target(reward: RewardConfig, token_file: Path) -> serve.RunTarget:
    config = server_config(reward, token_file)
    most = reward.max_replicas or reward.replicas
    scale: dict[str, Any] = (
        {"num_replicas": reward.replicas}
        if most == reward.replicas
        else {"num_replicas": "auto", "autoscaling_config": autoscaling(reward.replicas, most)}
    )
    deployment = deployment_of(config).options(
        **scale,
        ray_actor_options={"num_cpus": reward.num_cpus, "num_gpus": reward.num_gpus},
    )
    application = deployment.bind(config.model_dump(mode="json"))
    return serve.RunTarget(application, name=f"reward-{reward.name}", route_prefix=f"/{reward.name}")


def server_config(reward: RewardConfig, token_file: Path) -> ServerConfig:
    """What the server of a reward with an `app` is started with."""
    if reward.app is None:
        raise ValueError(f"reward {reward.name!r} has a url: its server is not ours to start")
    return ServerConfig(
        app=reward.app,
        args=reward.args,
        token_file=token_file.resolve(),
        threads=reward.threads,
        batching=reward.batching,
        deadline_s=reward.deadline_s,
    )


def _wait_ready(
    served: Sequence[RewardConfig],
    addresses: dict[str, str],
    token: str,
    until: float,
    deadline_s: float,
) -> None:
    waiting = {reward.name: reward for reward in served}
    reasons: dict[str, str] = {}
    with httpx.Client(headers={"Authorization": f"Bearer {token}"}, timeout=2.0, trust_env=False) as client:
        while waiting:
            statuses = serve.status().applications
            for name, reward in list(waiting.items()):
                reasons[name] = _not_ready(reward, statuses.get(f"reward-{name}"), client, addresses[name])
                if not reasons[name]:
                    del waiting[name]
            if not waiting:
                return
            if time.monotonic() > until:
                listed = "; ".join(f"{name}: {reasons[name]}" for name in waiting)
                raise RewardsNotReady(f"rewards not ready within {deadline_s:g} s: {listed}")
            time.sleep(_POLL_S)


def _not_ready(reward: RewardConfig, status: Any, client: httpx.Client, url: str) -> str:
    """Why a reward is not ready; empty if it is. Raises if it never will be."""
    if status is None:
        return "not yet known to Serve"
    if status.status == ApplicationStatus.DEPLOY_FAILED:
        messages = [status.message, *(d.message for d in status.deployments.values())]
        raise RewardsNotReady(
            f"reward {reward.name!r} ({reward.app}) failed to start: {_last_lines(messages)}"
        )
    if status.status != ApplicationStatus.RUNNING:
        messages = [deployment.message for deployment in status.deployments.values() if deployment.message]
        return " ".join([str(status.status), *messages])
    try:
        response = client.get(url + INFO_PATH)
    except httpx.HTTPError as error:
        return f"{url}{INFO_PATH}: {type(error).__name__}: {error}"
    if response.status_code != 200:
        return f"{url}{INFO_PATH}: {response.status_code} {response.text[:200]}"
    info = ServerInfo.model_validate_json(response.content)
    return "" if info.reward == reward.app else f"{url} answers as {info.reward!r}, not {reward.app!r}"


def _last_lines(messages: Sequence[str]) -> str:
    """The end of a traceback is what says what went wrong."""
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return " | ".join(lines[-6:])


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
