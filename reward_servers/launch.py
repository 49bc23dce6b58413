"""Starts the rewards of a run on Ray Serve, one application each, and stops them.

Promises
- Binds loopback unless told otherwise, with a request timeout; one proxy, on this node.
- Returns when every reward answers /v1/info with its own name, or raises RewardsNotReady within the deadline,
  naming what is not ready and why.
- What a Serve of its own refuses has an ErrorBody, like what its rewards refuse (proxy.py).
- Each call has an id of its own in its applications' names and routes: runs and evaluations on one Ray
  cluster may have rewards of one name, with tokens and arguments of their own.
- Stopped is only what was started here. A Serve that already runs on this Ray cluster is used as it is, and
  left running; so is one that was started here, where others have applications on it by then.

Ray must be initialised. The tokens' file must be readable where the replicas run.
"""

from __future__ import annotations

import hashlib
import logging
import random
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
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
from reward_servers.scorers import require_scorer
from reward_servers.server_config import ServerConfig, read_token
from services.config import RewardConfig
from services.config.placement import actor_options

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
PORTS = range(20_000, 32_768)
STARTS = 4
TAKEN = "Failed to bind to address"
"""What Serve says of a port that another process has."""
_POLL_S = 0.2
_GRACE_S = 5.0
"""How much later than the replica Serve gives a request up, so that the replica's reason is what is seen."""

_started: dict[str, tuple[str, str]] = {}
"""Applications of this process -> the id of the call that started them, and the reward."""
_owns_serve = False
"""Whether this process has started the Serve that runs."""


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
        try:
            require_scorer(str(reward.app))
        except ValueError as error:
            raise ValueError(f"reward {reward.name!r}: {error}") from error
    until = time.monotonic() + deadline_s
    token = read_token(token_file)
    owner = secrets.token_hex(4)
    targets = {reward.name: _target(reward, token_file, owner) for reward in served}
    # Serve tells of every step that it takes; whoever waits here shows progress of their own.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    owned = _owns_serve
    names = [target.name for target in targets.values()]
    made: list[str] = []
    try:
        request_s = max(reward.deadline_s for reward in served) + _GRACE_S
        base = start_serve(host, port, deadline_s=deadline_s, request_timeout_s=request_s)
        _refuse_taken(names)
        made = names
        _started.update((target.name, (owner, name)) for name, target in targets.items())
        serve.run_many(
            list(targets.values()),
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        addresses |= {name: f"{base}{target.route_prefix}" for name, target in targets.items()}
        applications = {name: target.name for name, target in targets.items()}
        _wait_ready(served, applications, addresses, token, until, deadline_s)
    except BaseException:
        _stop(made, end_serve=_owns_serve and not owned)
        raise
    return {reward.name: addresses[reward.name] for reward in rewards}


def scale_reward(reward: RewardConfig, replicas: int, *, token_file: Path) -> None:
    """Give a reward that `start_rewards` has started so many replicas from now on, and no autoscaling.

    Those that it has go on; those that are too many answer what they have first. Returns when Serve knows.

    Args:
        token_file: as it was started with.

    Raises:
        ValueError: this process has not started it.
    """
    owner = next((owner for owner, name in _started.values() if name == reward.name), None)
    if owner is None:
        raise ValueError(f"reward {reward.name!r} was not started here")
    scaled = reward.model_copy(update={"replicas": replicas, "max_replicas": None})
    serve.run_many(
        [_target(scaled, token_file, owner)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def stop_rewards() -> None:
    """Stop what this process started; nothing if it started nothing."""
    _stop(list(_started), end_serve=_owns_serve)


def _stop(names: Sequence[str], *, end_serve: bool) -> None:
    """Delete applications of this process, and with `end_serve` Serve too, unless others still use it."""
    global _owns_serve
    if ray.is_initialized():
        if end_serve and not _others(names):
            serve.shutdown()
            _owns_serve = False
        else:
            for name in names:
                serve.delete(name, _blocking=False)
    else:
        _owns_serve = False
    for name in names:
        _started.pop(name, None)


def _others(names: Sequence[str]) -> list[str]:
    """Applications that stay when those of `names` are gone."""
    try:
        found = serve.status().applications
    except RayError:
        return []  # A controller that does not answer, such as one that never came up, serves nobody.
    ending = ApplicationStatus.DELETING
    return [name for name, seen in found.items() if name not in names and seen.status != ending]


def _refuse_taken(names: Sequence[str]) -> None:
    """Serve would replace an application of the same name, whoever it belongs to."""
    if taken := sorted(set(names) & set(serve.status().applications)):
        raise RewardsNotReady(f"Serve already has an application {taken[0]!r}, which is not ours to replace")


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
        # From here on there may be a controller to stop, whether or not the proxy comes up.
        _owns_serve = True
        ports = [port] if port else [_free_port(host) for _ in range(STARTS)]
        running = _start_on(host, ports, deadline_s=deadline_s, request_timeout_s=request_timeout_s)
    elif (running.host, running.port) != (host, port or running.port):
        log.warning("Serve already runs on %s:%s, and keeps that address", running.host, running.port)
    return f"http://{running.host}:{running.port}"


def _start_on(host: str, ports: Sequence[int], *, deadline_s: float, request_timeout_s: float) -> HTTPOptions:
    """On the first of these ports that nobody has taken by then."""
    for port in ports:
        options = HTTPOptions(host=host, port=port, request_timeout_s=request_timeout_s)
        try:
            _start(options, deadline_s)
        except (RayError, TimeoutError) as error:
            if TAKEN in str(error) and port != ports[-1]:
                log.warning("port %d was taken while Serve started; another one is tried", port)
                serve.shutdown()
                continue
            reason = str(error).strip().splitlines()
            raise RewardsNotReady(
                f"Ray Serve did not start on {host}:{port} within {deadline_s:g} s "
                f"({type(error).__name__}: {reason[-1] if reason else ''}); is the machine overloaded?"
            ) from error
        return options
    raise AssertionError("unreachable: the last port is started on, or raises")


def _start(options: HTTPOptions, deadline_s: float) -> None:
    """Serve waits 60 s for its proxy, on however busy a machine; a second call finds what is coming up."""
    until = time.monotonic() + deadline_s
    while True:
        try:
            serve.start(
                proxy_location=ProxyLocation.HeadOnly,
                http_options=options,
                logging_config=QUIET,
                controller_options=_environment(deadline_s),
            )
        except TimeoutError:
            if time.monotonic() > until:
                raise
        else:
            return


def _environment(deadline_s: float) -> dict[str, Any]:
    """Serve kills a proxy that is not up within 5 s, or silent for 10 s: too soon for a busy machine. A dead
    one it replaces behind the third look, every 10 s by default."""
    return {
        "runtime_env": {
            "env_vars": {
                "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(deadline_s),
                "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
                "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
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


def _target(reward: RewardConfig, token_file: Path, owner: str) -> serve.RunTarget:
    config = server_config(reward, token_file)
    most = reward.max_replicas or reward.replicas
    scale: dict[str, Any] = (
        {"num_replicas": reward.replicas}
        if most == reward.replicas
        else {"num_replicas": "auto", "autoscaling_config": autoscaling(reward.replicas, most)}
    )
    # With a version of its own, Serve would replace every replica when their number changes.
    version = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16]
    deployment = deployment_of(config).options(
        **scale,
        version=version,
        _internal=True,
        ray_actor_options=actor_options(reward),
    )
    application = deployment.bind(config.model_dump(mode="json"))
    return serve.RunTarget(
        application, name=f"reward-{owner}-{reward.name}", route_prefix=f"/{owner}/{reward.name}"
    )


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
    applications: Mapping[str, str],
    addresses: Mapping[str, str],
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
                reasons[name] = _not_ready(reward, statuses.get(applications[name]), client, addresses[name])
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
    """One that is free now, below those that the system hands out by itself: Ray's processes take many of
    those between this look and the start of the proxy."""
    for port in random.SystemRandom().sample(PORTS, 20):
        try:
            with socket.create_server((host, port)):
                return port
        except OSError:
            continue
    with socket.create_server((host, 0)) as probe:
        found: int = probe.getsockname()[1]
        return found
