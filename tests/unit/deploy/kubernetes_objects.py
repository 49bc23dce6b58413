"""The parts of Kubernetes' and KubeRay's schemas that deploy/kuberay uses, with nothing else allowed.

Written after the API reference of Kubernetes 1.31 and KubeRay 1.6.2; no schema of theirs is vendored. A field
that is not here is not wrong: look it up there, and add it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, model_validator
from pydantic.alias_generators import to_camel

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
PortName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?$")]
Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Labels = dict[str, str]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(Strict):
    name: Name
    namespace: Name | None = None
    labels: Labels = {}


class TemplateMetadata(Strict):
    labels: Labels


class SecretKey(Strict):
    name: Name
    key: str


class EnvSource(Strict):
    secret_key_ref: SecretKey


class Env(Strict):
    name: str
    value: str | None = None
    value_from: EnvSource | None = None

    @model_validator(mode="after")
    def _one(self) -> Env:
        assert (self.value is None) != (self.value_from is None), f"{self.name}: value or valueFrom"
        return self


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity] = {}


class Capabilities(Strict):
    drop: list[Literal["ALL"]]


class ContainerSecurity(Strict):
    allow_privilege_escalation: Literal[False]
    capabilities: Capabilities
    read_only_root_filesystem: bool = False


class SeccompProfile(Strict):
    type: Literal["RuntimeDefault"]


class PodSecurity(Strict):
    run_as_non_root: Literal[True]
    run_as_user: int = Field(ge=1)
    run_as_group: int = Field(ge=1)
    fs_group: int = Field(ge=1)
    seccomp_profile: SeccompProfile


class ContainerPort(Strict):
    name: PortName
    container_port: Port


class TcpSocket(Strict):
    port: PortName


class Probe(Strict):
    tcp_socket: TcpSocket
    period_seconds: int
    failure_threshold: int = 3


class VolumeMount(Strict):
    name: Name
    mount_path: Annotated[str, StringConstraints(pattern="^/")]
    read_only: bool = False


class Container(Strict):
    name: Name
    image: str
    command: list[str] = []
    env: list[Env] = []
    ports: list[ContainerPort] = []
    readiness_probe: Probe | None = None
    liveness_probe: Probe | None = None
    resources: Resources
    security_context: ContainerSecurity
    volume_mounts: list[VolumeMount] = []


class ConfigMapVolume(Strict):
    name: Name


class EmptyDir(Strict):
    medium: Literal["Memory", ""] = ""
    size_limit: Quantity | None = None


class ClaimVolume(Strict):
    claim_name: Name


class Volume(Strict):
    name: Name
    config_map: ConfigMapVolume | None = None
    empty_dir: EmptyDir | None = None
    persistent_volume_claim: ClaimVolume | None = None


class Toleration(Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "NoExecute", "PreferNoSchedule"]


class PodSpec(Strict):
    automount_service_account_token: bool = True
    security_context: PodSecurity
    termination_grace_period_seconds: int = 30
    restart_policy: Literal["Always", "OnFailure", "Never"] = "Always"
    tolerations: list[Toleration] = []
    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume] = []

    @model_validator(mode="after")
    def _volumes_are_there(self) -> PodSpec:
        there = {volume.name for volume in self.volumes}
        for container in self.containers:
            missing = {mount.name for mount in container.volume_mounts} - there
            assert not missing, f"{container.name}: no volume {missing}"
        return self


class PodTemplate(Strict):
    metadata: TemplateMetadata
    spec: PodSpec


class Namespace(Strict):
    api_version: Literal["v1"]
    kind: Literal["Namespace"]
    metadata: Metadata


class Secret(Strict):
    api_version: Literal["v1"]
    kind: Literal["Secret"]
    metadata: Metadata
    type: Literal["Opaque"]
    string_data: dict[str, str]


class ServicePort(Strict):
    name: PortName
    port: Port
    target_port: PortName


class ServiceSpec(Strict):
    cluster_ip: Literal["None"] = Field(alias="clusterIP")
    selector: Labels
    ports: list[ServicePort]


class Service(Strict):
    api_version: Literal["v1"]
    kind: Literal["Service"]
    metadata: Metadata
    spec: ServiceSpec


class ClaimResources(Strict):
    requests: dict[Literal["storage"], Quantity]


class ClaimSpec(Strict):
    access_modes: list[Literal["ReadWriteOnce", "ReadWriteMany"]]
    storage_class_name: str | None = None
    resources: ClaimResources


class Claim(Strict):
    api_version: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


class ClaimTemplate(Strict):
    metadata: Metadata
    spec: ClaimSpec


class Selector(Strict):
    match_labels: Labels = {}


class StatefulSetSpec(Strict):
    service_name: Name
    replicas: int
    selector: Selector
    template: PodTemplate
    volume_claim_templates: list[ClaimTemplate]

    @model_validator(mode="before")
    @classmethod
    def _claims_are_volumes(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """A claim template gives each pod a volume of its name."""
        spec = raw["template"]["spec"]
        claims = [
            {"name": claim["metadata"]["name"], "persistentVolumeClaim": {"claimName": "of-the-pod"}}
            for claim in raw["volumeClaimTemplates"]
        ]
        volumes = [*spec.get("volumes", []), *claims]
        return {**raw, "template": {**raw["template"], "spec": {**spec, "volumes": volumes}}}


class StatefulSet(Strict):
    api_version: Literal["apps/v1"]
    kind: Literal["StatefulSet"]
    metadata: Metadata
    spec: StatefulSetSpec


class Peer(Strict):
    pod_selector: Selector | None = None
    namespace_selector: Selector | None = None


class PolicyPort(Strict):
    protocol: Literal["TCP", "UDP"]
    port: Port


class Ingress(Strict):
    from_: list[Peer] = Field(alias="from", min_length=1)
    ports: list[PolicyPort] = []


class PolicySpec(Strict):
    pod_selector: Selector
    policy_types: list[Literal["Ingress", "Egress"]]
    ingress: list[Ingress] = []
    egress: list[Any] = Field(default=[], max_length=0)


class NetworkPolicy(Strict):
    api_version: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: PolicySpec


class AuthOptions(Strict):
    mode: Literal["token", "disabled"]
    secret_name: Name


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"]
    idle_timeout_seconds: int
    resources: Resources
    security_context: ContainerSecurity


class HeadGroup(Strict):
    ray_start_params: dict[str, str]
    template: PodTemplate


class WorkerGroup(Strict):
    group_name: Name
    replicas: int = Field(ge=0)
    min_replicas: int = Field(ge=0)
    max_replicas: int = Field(ge=0)
    ray_start_params: dict[str, str]
    template: PodTemplate

    @model_validator(mode="after")
    def _in_order(self) -> WorkerGroup:
        assert self.min_replicas <= self.replicas <= self.max_replicas
        return self


class RayClusterSpec(Strict):
    ray_version: str
    auth_options: AuthOptions
    enable_in_tree_autoscaling: bool
    autoscaler_options: AutoscalerOptions
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]


class RayCluster(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec


class SubmitterTemplate(Strict):
    metadata: TemplateMetadata
    spec: PodSpec


class RayJobSpec(Strict):
    entrypoint: str
    entrypoint_resources: str
    runtime_env_yaml: str = Field(alias="runtimeEnvYAML")
    backoff_limit: int = Field(ge=0)
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: int
    submitter_pod_template: SubmitterTemplate
    ray_cluster_spec: RayClusterSpec

    @model_validator(mode="after")
    def _ttl_needs_a_shutdown(self) -> RayJobSpec:
        assert self.shutdown_after_job_finishes or not self.ttl_seconds_after_finished
        return self


class RayJob(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class UpgradeStrategy(Strict):
    type: Literal["NewCluster", "None"]


class RayServiceSpec(Strict):
    upgrade_strategy: UpgradeStrategy
    ray_cluster_deletion_delay_seconds: int = Field(ge=0)
    exclude_head_pod_from_serve_svc: bool
    serve_config_v2: str = Field(alias="serveConfigV2")
    ray_cluster_config: RayClusterSpec


class RayService(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


KubernetesObject = Annotated[
    Namespace | Secret | Service | Claim | StatefulSet | NetworkPolicy | RayCluster | RayJob | RayService,
    Field(discriminator="kind"),
]
OBJECT: TypeAdapter[KubernetesObject] = TypeAdapter(KubernetesObject)
