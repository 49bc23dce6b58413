"""One class a tracking library: how its run is begun, goes on, is told numbers, and ends.

The project is `dgpo` unless the library's own variable names one; the run is named as the run
directory. Where a library would write into the working directory, which a Ray job loses, its place is the run
directory, or for MLflow one store beside the runs, so that they can be compared.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any, Final

from services.config.parts import TrackerName
from services.run_directory import RunDirectory
from services.trackers import Tracker

PROJECT: Final = "dgpo"
MLFLOW_PARAMS: Final = 100
"""That one request may have."""


class TrackerRefused(Exception):
    """A tracker cannot be used; the text says what to do."""


def open_tracker(name: TrackerName, run: RunDirectory, group: str, facts: Mapping[str, Any]) -> Tracker:
    """Begin the run there, or go on with it.

    Args:
        group: of the runs of one recipe.
        facts: the configuration, flat.
    """
    kinds: dict[TrackerName, type[Wandb | Mlflow | Trackio]] = {
        "wandb": Wandb,
        "mlflow": Mlflow,
        "trackio": Trackio,
    }
    return kinds[name](run, group, dict(facts))


class Wandb:
    """Weights & Biases; WANDB_MODE=offline writes into the run directory, for `wandb sync`."""

    def __init__(self, run: RunDirectory, group: str, facts: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        offline = os.environ.get("WANDB_MODE", "").lower() in ("offline", "disabled", "dryrun")
        # It would ask whoever sits at the terminal.
        if not offline and not wandb.api.api_key:
            raise TrackerRefused("no key for it: `wandb login`, WANDB_API_KEY, or WANDB_MODE=offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.name,
            name=run.name,
            group=group,
            config=facts,
            dir=os.environ.get("WANDB_DIR", str(run.root)),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        # Held-out scores come later than the updates that follow them.
        self._run.define_metric("*", step_metric="step")

    def log(self, numbers: Mapping[str, float], step: int, time: float) -> None:
        self._run.log({**numbers, "step": step})

    def finish(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Mlflow:
    """MLflow by its tracking API alone."""

    def __init__(self, run: RunDirectory, group: str, facts: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.root.parent / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=store)
        note = run.root / "mlflow_run_id"
        if note.is_file():
            self._id = note.read_text().strip()
            self._client.update_run(self._id, status="RUNNING")
            return
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT), run)
        made = self._client.create_run(experiment, run_name=run.name, tags={"recipe": group})
        self._id = made.info.run_id
        note.write_text(self._id)
        params = [Param(name, str(value)) for name, value in facts.items()]
        for first in range(0, len(params), MLFLOW_PARAMS):
            self._client.log_batch(self._id, params=params[first : first + MLFLOW_PARAMS])

    def _experiment(self, name: str, run: RunDirectory) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException:  # another run was quicker
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)

    def log(self, numbers: Mapping[str, float], step: int, time: float) -> None:
        stamp = int(time * 1000)
        metrics = [self._metric(name, value, stamp, step) for name, value in numbers.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


class Trackio:
    """trackio, into TRACKIO_DIR of this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says so."""

    def __init__(self, run: RunDirectory, group: str, facts: dict[str, Any]) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        import trackio

        # It greets on standard output, which belongs to results.
        with redirect_stdout(StringIO()):
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=run.name,
                group=group,
                config=facts,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, numbers: Mapping[str, float], step: int, time: float) -> None:
        self._run.log(dict(numbers), step=step)

    def finish(self, *, failed: bool) -> None:
        with redirect_stdout(StringIO()):
            self._run.finish()
