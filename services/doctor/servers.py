"""What `dgpo doctor` asks of servers: the queue, and rewards by address."""

from __future__ import annotations

import os

import httpx
import redis

from services.config import Config, RewardConfig
from services.config_file import ConfigError
from services.context import queue_authority, reward_authority
from services.doctor.finding import Finding
from services.prompts import evaluates
from services.spoken import OWN_PORT

REACH_DEADLINE_S = 5.0
_NO_AUTHORITY = "name a PEM file of certificates that this machine has"


def scores_nothing(config: Config) -> bool:
    """Whether a run needs no reward server: it trains from a recording, and evaluates nothing."""
    try:
        return config.offline and not evaluates(config)
    except ConfigError:
        return False


def queue_findings(config: Config) -> list[Finding]:
    """Is the queue server there, and does it take the logins?"""
    if config.queue.url is None:
        return [Finding(what="queue", ok=True, found="an embedded Valkey server on loopback")]
    url, logins = config.queue.url, config.queue.logins
    try:
        trusted = queue_authority(config)
    except ConfigError as error:
        return [Finding(what="queue", ok=False, found=str(error), remedy=_NO_AUTHORITY)]
    if not logins:
        return [_queue_login(url, "queue", None, config.queue.password_env, trusted)]
    return [
        _queue_login(url, f"queue {part}", login.user or part, login.password_env, trusted)
        for part, login in logins.items()
    ]


def _queue_login(url: str, what: str, user: str | None, variable: str | None, trusted: str | None) -> Finding:
    from services.group_queue import QueueUnreachable, connect
    from services.queue_connection import NOT_REDIS

    password = os.environ.get(variable) if variable else None
    if variable and not password:
        found = f"{variable} is not set here"
        if user is not None and what != "queue driver":
            # A node need not know the passwords of parts that do not run on it.
            return Finding(what=what, ok=True, warning=True, found=f"{found}: not tried")
        return Finding(what=what, ok=False, found=found, remedy=f"export {variable}=... before starting")
    try:
        client = connect(url, password, user=user, authority=trusted)
        policy = client.config_get("maxmemory-policy").get("maxmemory-policy", "unknown")
    except QueueUnreachable as error:
        remedy = OWN_PORT if NOT_REDIS in str(error) else "mend the server, queue.url or the login"
        return Finding(what=what, ok=False, found=str(error), remedy=remedy)
    except redis.ResponseError as error:  # CONFIG may be forbidden to this user: that is no fault
        return Finding(what=what, ok=True, found=f"reachable; maxmemory-policy not readable: {error}")
    ok = policy == "noeviction"
    remedy = "" if ok else "set maxmemory-policy noeviction: an evicted group is a lost group"
    return Finding(what=what, ok=ok, found=f"reachable, maxmemory-policy {policy}", remedy=remedy)


def reward_findings(config: Config) -> list[Finding]:
    """Is every reward served here or there, with a token that is taken?"""
    if scores_nothing(config):
        return [Finding(what="rewards", ok=True, found="recorded; no server is needed without eval.path")]
    return [_reward(reward) for reward in config.rewards]


def _reward(reward: RewardConfig) -> Finding:
    what = f"reward {reward.name}"
    if reward.app is not None:
        from reward_servers.scorers import is_scorer, scorer_names

        ok = is_scorer(reward.app)
        valid = ", ".join(scorer_names())
        remedy = "" if ok else f"set rewards[].app to one of {valid}, or to package.module:create"
        found = f"served by this run: {reward.app}" if ok else f"no scorer {reward.app!r}"
        if ok and (unlike := _on_another_device(reward)):
            return Finding(what=what, ok=True, warning=True, found=f"{found}; {unlike[0]}", remedy=unlike[1])
        return Finding(what=what, ok=ok, found=found, remedy=remedy)
    token = os.environ.get(reward.token_env) if reward.token_env else None
    if reward.token_env and not token:
        return Finding(
            what=what,
            ok=False,
            found=f"{reward.token_env} is not set",
            remedy=f"export {reward.token_env}=... before starting",
        )
    from reward_servers.exchange import client_options
    from reward_servers.protocol import INFO_PATH, server_address
    from reward_servers.tls import refusal

    address = server_address(str(reward.url)) + INFO_PATH
    try:
        trusted = reward_authority(reward)
    except ConfigError as error:
        return Finding(what=what, ok=False, found=str(error), remedy=_NO_AUTHORITY)
    try:
        with httpx.Client(**client_options(httpx.URL(address), token, authority=trusted)) as client:
            answer = client.get(address, timeout=REACH_DEADLINE_S)
        info = answer.json() if answer.status_code == 200 else None
    except (httpx.HTTPError, ValueError) as error:
        why = refusal(error, "rewards[].tls_ca")
        remedy = "mend the certificate, rewards[].url or rewards[].tls_ca"
        if why is None:
            why, remedy = str(error) or type(error).__name__, "start the reward server, or mend rewards[].url"
        return Finding(what=what, ok=False, found=f"{address}: {why}", remedy=remedy)
    if info is None:
        remedy = "set rewards[].token_env" if answer.status_code == 401 else "is this a reward server?"
        return Finding(what=what, ok=False, found=f"{address}: HTTP {answer.status_code}", remedy=remedy)
    return Finding(what=what, ok=True, found=f"{address}: {info}")


def _on_another_device(reward: RewardConfig) -> tuple[str, str] | None:
    """Where a scorer reserves a GPU and computes on the CPU, or the other way round: that, and what to do."""
    device = str(reward.args.get("device", "cpu"))
    if reward.num_gpus > 0 and device == "cpu":
        remedy = "set args.device of the reward to cuda if its scorer has one, or num_gpus to 0"
        return f"it reserves {reward.num_gpus:g} GPU, and args.device is cpu", remedy
    if reward.num_gpus == 0 and device != "cpu":
        remedy = "give the reward a share of a GPU in num_gpus, or args.device cpu"
        return f"args.device is {device}, and it reserves no GPU", remedy
    return None
