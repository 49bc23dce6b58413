"""The run page as a Ray Serve application, for a cluster whose nodes share the run directory.

    serve run services.ui.serve_app:build run_dir=/shared/runs/RUN token_env=DGPO_UI_TOKEN

or, in a Serve config file, `import_path: services.ui.serve_app:build`, with the fields of RunPageConfig as
`args`.

Promises
- Arguments hold no secret: Serve shows them on its dashboard. The token is read in the replica, from a
  variable that must be set on its node before `ray start`.
- The page answers to loopback names, to IP addresses and to `hosts`: give the name that it is reached by.
- One replica: each would read the metrics for itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.deployment import Application

from services.run_directory import RunDirectory
from services.ui.access import LOOPBACK_NAMES, Access, token_of
from services.ui.app import create_app
from services.ui.watch import Watch

MOST_PAGES = 64
"""Open pages: each holds a stream."""


class RunPageConfig(BaseModel):
    """What the application is told."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run_dir: Path
    token_env: str
    """Variable that holds the token."""
    compare: tuple[Path, ...] = ()
    """Runs whose configuration is compared with this one's."""
    hosts: tuple[str, ...] = ()
    """Names that the page answers to beside loopback and addresses."""


@serve.ingress()
class RunPage:
    """A replica: the page's application."""

    def __init__(self, args: dict[str, Any]) -> None:
        config = RunPageConfig.model_validate(args)
        others = map(RunDirectory.open, config.compare)
        self._app = create_app(
            Watch(RunDirectory.open(config.run_dir)),
            token=token_of(config.token_env),
            compare={other.name: other.root for other in others},
            hosts=LOOPBACK_NAMES | set(config.hosts),
            any_address=True,
        )

    def __serve_build_asgi_app__(self) -> Access:
        return self._app


def build(args: dict[str, Any]) -> Application:
    """A Serve application from its `args`: the fields of RunPageConfig."""
    config = RunPageConfig.model_validate(args)
    deployment = serve.deployment(
        name="run-page",
        num_replicas=1,
        max_ongoing_requests=MOST_PAGES,
        ray_actor_options={"num_cpus": 0},
        # Streams never end by themselves; a page that loses one comes back.
        graceful_shutdown_timeout_s=1,
        max_constructor_retry_count=2,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )(RunPage)
    application: Application = deployment.bind(config.model_dump(mode="json"))
    return application
