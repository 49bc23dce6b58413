"""deploy/kuberay: every manifest is what Kubernetes and KubeRay take, and all of them agree with the code."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_objects import (
    OBJECT,
    Claim,
    Container,
    KubernetesObject,
    NetworkPolicy,
    PodTemplate,
    RayCluster,
    RayClusterSpec,
    RayJob,
    RayService,
    Secret,
    Service,
    StatefulSet,
)
from pydantic import ValidationError
from ray.runtime_env import RuntimeEnv
from ray.serve.schema import ServeDeploySchema

from reward_servers.server_config import ServerConfig
from services.config_file import PROJECT_ROOT, load_config

FOLDER = PROJECT_ROOT / "deploy" / "kuberay"
NOT_MANIFESTS = {"kustomization.yaml", "quickstart.yaml"}
MANIFESTS = sorted(path for path in FOLDER.glob("*.yaml") if path.name not in NOT_MANIFESTS)
RAW = [(path, raw) for path in MANIFESTS for raw in yaml.safe_load_all(path.read_text())]
OBJECTS: list[KubernetesObject] = [OBJECT.validate_python(raw) for _, raw in RAW]
CONFIG = load_config(FOLDER / "quickstart.yaml")
SERVED = yaml.safe_load((PROJECT_ROOT / "deploy" / "compose" / "rewards.yaml").read_text())


def of(kind: type[Any], name: str | None = None) -> Any:
    (found,) = [o for o in OBJECTS if isinstance(o, kind) and name in (None, o.metadata.name)]
    return found


def clusters() -> dict[str, RayClusterSpec]:
    return {
        "RayCluster": of(RayCluster).spec,
        "RayJob": of(RayJob).spec.ray_cluster_spec,
        "RayService": of(RayService).spec.ray_cluster_config,
    }


def pods() -> Iterator[PodTemplate]:
    yield of(StatefulSet).spec.template
    yield of(RayJob).spec.submitter_pod_template
    for cluster in clusters().values():
        yield cluster.head_group_spec.template
        for group in cluster.worker_group_specs:
            yield group.template


def role(pod: PodTemplate) -> str:
    return pod.metadata.labels["dgpo/role"]


def containers(of_role: str) -> list[Container]:
    return [container for pod in pods() if role(pod) == of_role for container in pod.spec.containers]


def environment(container: Container) -> dict[str, str]:
    """Variable -> secret/key, or value."""
    return {
        env.name: str(env.value)
        if env.value_from is None
        else f"{env.value_from.secret_key_ref.name}/{env.value_from.secret_key_ref.key}"
        for env in container.env
    }


def ports(container: Container) -> dict[str, int]:
    return {port.name: port.container_port for port in container.ports}


def test_every_file_is_a_manifest_or_known() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {path.name for path in MANIFESTS} | NOT_MANIFESTS


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw["spec"].update(workerGroupSpec=[]),
        lambda raw: raw["spec"].update(rayVersion=2.6),
        lambda raw: raw["spec"]["workerGroupSpecs"][0].update(minReplicas=9),
        lambda raw: raw["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda raw: raw["spec"]["headGroupSpec"]["template"]["spec"].update(volumes=[]),
        lambda raw: raw["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(envs=[]),
    ],
)
def test_the_models_refuse_what_the_api_would(spoil: Any) -> None:
    (raw,) = [copy.deepcopy(raw) for _, raw in RAW if raw["kind"] == "RayCluster"]
    OBJECT.validate_python(raw)
    spoil(raw)
    with pytest.raises(ValidationError):
        OBJECT.validate_python(raw)


def test_the_kustomization_names_files_that_are_there() -> None:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    listed = {FOLDER / name for name in kustomization["resources"]}
    assert all(path.exists() for path in listed)
    apart = {FOLDER / "secrets.template.yaml", FOLDER / "rayjob.yaml"}
    assert set(MANIFESTS) - apart <= listed
    assert apart.isdisjoint(listed), "secrets are made by hand, runs are applied one by one"
    generated = yaml.safe_load((PROJECT_ROOT / "deploy" / "redis" / "kustomization.yaml").read_text())
    (config,) = generated["configMapGenerator"]
    assert all((PROJECT_ROOT / "deploy" / "redis" / name).is_file() for name in config["files"])
    volumes = of(StatefulSet).spec.template.spec.volumes
    assert {v.config_map.name for v in volumes if v.config_map} == {config["name"]}
    images = {image["name"] for image in kustomization["images"]}
    used = {c.image.partition(":")[0] for pod in pods() for c in pod.spec.containers}
    assert images == {image for image in used if "/" not in image}


def test_secrets_are_templates_and_those_that_are_read() -> None:
    made = {f"{s.metadata.name}/{key}" for s in OBJECTS if isinstance(s, Secret) for key in s.string_data}
    assert all(value == "" for s in OBJECTS if isinstance(s, Secret) for value in s.string_data.values())
    read = {
        f"{env.value_from.secret_key_ref.name}/{env.value_from.secret_key_ref.key}"
        for pod in pods()
        for container in pod.spec.containers
        for env in container.env
        if env.value_from
    }
    # KubeRay reads this key of the secret that authOptions names.
    tokens = {f"{cluster.auth_options.secret_name}/auth_token" for cluster in clusters().values()}
    assert made == read | tokens


def test_every_cluster_asks_for_tokens_and_has_the_ray_of_constraints() -> None:
    pinned = re.search(r"^ray==(\S+)$", (PROJECT_ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    for cluster in clusters().values():
        assert cluster.ray_version == pinned[1]
        assert cluster.auth_options.mode == "token"
        assert cluster.enable_in_tree_autoscaling
        assert any(group.max_replicas > group.replicas for group in cluster.worker_group_specs)
        for template in (cluster.head_group_spec.template, *(g.template for g in cluster.worker_group_specs)):
            assert template.spec.restart_policy == "Never", "the autoscaler of version 2 wants it"


def test_a_run_finds_in_its_environment_what_its_recipe_names() -> None:
    assert CONFIG.queue.password_env is not None
    for container in containers("trainer"):
        found = environment(container)
        assert found[CONFIG.queue.password_env] == "dgpo-queue/password"
        for reward in CONFIG.rewards:
            assert reward.token_env is not None and found[reward.token_env] == "dgpo-reward/token"
    (queue,) = containers("queue")
    assert environment(queue) == {"DGPO_QUEUE_PASSWORD": "dgpo-queue/password"}


def test_the_recipe_reaches_queue_and_rewards() -> None:
    service, queue = of(Service), of(StatefulSet)
    (port,) = service.spec.ports
    (container,) = queue.spec.template.spec.containers
    assert CONFIG.queue.url == f"redis://run@{service.metadata.name}:{port.port}/0"
    assert ports(container)[port.target_port] == port.port == redis_port()
    assert service.spec.selector == queue.spec.selector.match_labels == queue.spec.template.metadata.labels
    serve = ServeDeploySchema.model_validate(yaml.safe_load(of(RayService).spec.serve_config_v2))
    # KubeRay's name for the service of a RayService.
    base = f"http://{of(RayService).metadata.name}-serve-svc:{serve.http_options.port}"
    offered = {base + app.route_prefix: app.args["app"] for app in serve.applications}
    quickstart = {reward.name: reward.app for reward in load_config("quickstart").rewards}
    assert {reward.name: offered[str(reward.url)] for reward in CONFIG.rewards} == quickstart
    for container in containers("rewards"):
        assert ports(container)["serve"] == serve.http_options.port


def redis_port() -> int:
    found = re.search(r"^port (\d+)$", (PROJECT_ROOT / "deploy" / "redis" / "redis.conf").read_text(), re.M)
    assert found is not None
    return int(found[1])


def test_the_rewards_are_those_of_compose_on_every_node() -> None:
    raw = yaml.safe_load(of(RayService).spec.serve_config_v2)
    assert raw == SERVED | {"proxy_location": "EveryNode"}
    schema = ServeDeploySchema.model_validate(raw)
    for app in raw["applications"]:
        config = ServerConfig.model_validate(app["args"])
        for container in containers("rewards"):
            assert config.token_env in environment(container)
        assert schema.http_options.request_timeout_s > config.deadline_s
        # A cluster that is replaced answers what it has.
        assert of(RayService).spec.ray_cluster_deletion_delay_seconds > config.deadline_s
    assert (schema.http_options.host, str(schema.proxy_location.value)) == ("0.0.0.0", "EveryNode")
    for container in containers("rewards"):
        place = environment(container)["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
        assert place == "reward_servers.proxy.error_bodies"


def test_the_job_has_the_trainer_of_the_cluster() -> None:
    assert clusters()["RayJob"] == clusters()["RayCluster"]


def test_the_job_begins_or_goes_on_with_its_run() -> None:
    spec, name = of(RayJob).spec, of(RayJob).metadata.name
    shell, script, runs, run, recipe = shlex.split(spec.entrypoint)
    assert (shell, run) == ("bash", name)
    for place in (script, recipe):
        # Where trainer.Dockerfile puts it; test_images.py says that it does.
        assert (PROJECT_ROOT / Path(place).relative_to("/srv/dgpo")).is_file()
    assert load_config(PROJECT_ROOT / Path(recipe).relative_to("/srv/dgpo")) == CONFIG
    for container in containers("trainer"):
        assert runs in {mount.mount_path for mount in container.volume_mounts}
    env = yaml.safe_load(spec.runtime_env_yaml)
    RuntimeEnv(**env)
    assert (
        env["env_vars"] == yaml.safe_load((PROJECT_ROOT / "deploy/runtime_env.yaml").read_text())["env_vars"]
    )


def test_the_driver_goes_to_the_head_which_takes_nobody_else() -> None:
    wanted = json.loads(of(RayJob).spec.entrypoint_resources)
    for name in ("RayCluster", "RayJob"):
        head = clusters()[name].head_group_spec
        # KubeRay puts `--resources=VALUE` into a command of a shell.
        (value,) = shlex.split(head.ray_start_params["resources"])
        offered = json.loads(value)
        assert all(offered[resource] >= amount for resource, amount in wanted.items())
        assert head.ray_start_params["num-cpus"] == "0" and head.ray_start_params["num-gpus"] == "0"
        assert not any("nvidia.com/gpu" in c.resources.requests for c in head.template.spec.containers)
        assert not any("resources" in g.ray_start_params for g in clusters()[name].worker_group_specs)


def test_one_worker_group_can_hold_the_quickstart() -> None:
    for name in ("RayCluster", "RayJob"):
        (group,) = [g for g in clusters()[name].worker_group_specs if g.group_name == "cpu"]
        cpus = sum(float(c.resources.requests["cpu"]) for c in group.template.spec.containers)
        needed = CONFIG.rollout.num_cpus * CONFIG.rollout.workers + CONFIG.learner.num_cpus
        assert needed <= cpus and group.max_replicas >= 1


def test_volumes_that_are_claimed_are_there() -> None:
    claim = of(Claim)
    assert claim.spec.access_modes == ["ReadWriteMany"], "several nodes write into a run directory"
    claimed = {
        v.persistent_volume_claim.claim_name
        for p in pods()
        for v in p.spec.volumes
        if v.persistent_volume_claim
    }
    assert claimed == {claim.metadata.name, "of-the-pod"}


def test_network_policies_let_through_what_is_needed_and_no_more() -> None:
    policies = {p.metadata.name: p.spec for p in OBJECTS if isinstance(p, NetworkPolicy)}
    everybody = policies.pop("nobody")
    assert everybody.pod_selector.match_labels == {} and everybody.ingress == []
    roles = {role(pod) for pod in pods()}
    allowed = {
        (peer.pod_selector.match_labels["dgpo/role"], to, tuple(port.port for port in rule.ports))
        for to, spec in policies.items()
        for rule in spec.ingress
        for peer in rule.from_
        if peer.pod_selector is not None and "dgpo/role" in peer.pod_selector.match_labels
    }
    assert {source for source, _, _ in allowed} | set(policies) <= roles
    assert allowed == {
        ("trainer", "queue", (redis_port(),)),
        ("trainer", "trainer", ()),
        ("submitter", "trainer", (8265,)),
        ("rewards", "rewards", ()),
        ("trainer", "rewards", (8000,)),
    }
    assert policies["queue"].egress == [] and "Egress" in policies["queue"].policy_types
    for to in ("trainer", "rewards"):
        named = set(ports(containers(to)[0]).values())
        opened = {port.port for rule in policies[to].ingress for port in rule.ports}
        assert opened <= named


def test_nothing_runs_as_root_or_uses_the_newest_of_an_image() -> None:
    for pod in pods():
        assert pod.spec.security_context.run_as_user > 0
        for container in pod.spec.containers:
            assert re.search(r":v?\d[\w.-]*$", container.image), container.image
            assert container.resources.limits.get("memory") == container.resources.requests["memory"]
