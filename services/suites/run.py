"""Evaluates a model on a suite: shards over rollout workers, into a folder that can be gone on with.

Promises
- Prompts, seeds, batches and what is scored together do not depend on the number of workers: one worker gives
  what ten give.
- A worker that dies is made anew and its shard sampled again, `rollout.max_restarts` times; a reward that
  cannot be had ends the evaluation with its name, and finished shards stay.
- Only what is missing is sampled; with nothing missing neither Ray nor a model is started.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rollout_workers.suite_worker import ShardScores, ShardTask, SuiteWork, SuiteWorker
from services.config import Config
from services.config_file import ConfigError
from services.context import RewardPlace
from services.formatting import reason
from services.prompts import sample_seeds
from services.run_directory import RunDirectory
from services.suites.folder import UNKNOWN, EvaluationFolder, Sample
from services.suites.prompts import Suite
from services.suites.settings import EvaluationSettings, settings_of
from services.suites.sheet import write_sheet
from services.suites.summary import EXACT, summarize


@dataclass(frozen=True)
class SuiteEvaluation:
    """What is evaluated, on what and how."""

    config: Config
    """With the rewards to ask for (settings.py `with_rewards`)."""
    weights: Path | None
    """Directory of a checkpoint, or of an exported LoRA; None: those of the pipeline."""
    kind: str | None
    """`ema` or `policy`, of a checkpoint; `lora`; None, of a pipeline."""
    suite: Suite
    samples: int
    """Images a prompt."""
    keep_images: bool = False
    base_digest: str | None = None
    """Of the base that a LoRA needs; None: any will do."""

    def task(self, number: int, shard_prompts: int) -> ShardTask:
        """The prompts and seeds of a shard: with one sample those of an evaluation inside a run."""
        places = range(number * shard_prompts, min((number + 1) * shard_prompts, len(self.suite.prompts)))
        return ShardTask(
            number=number,
            prompts=tuple(self.suite.prompts[place] for place in places),
            seeds=tuple(sample_seeds(self.config.eval.seed, "eval", place, self.samples) for place in places),
        )


def evaluate_suite(evaluation: SuiteEvaluation, out: Path, screen: Console) -> dict[str, Any]:
    """Evaluate, or go on with an evaluation that was begun.

    Args:
        out: the folder.
        screen: where people look.

    Returns:
        summary.py `summarize`, also in `summary.json` of the folder.

    Raises:
        ConfigError: the folder holds something else, or an evaluation with other settings; or the model, if
            it is here and large, is not whole.
        RuntimeError: a worker kept failing, or a shard was not done within `eval.deadline_s`.
    """
    settings = settings_of(
        evaluation.config, evaluation.weights, evaluation.kind, evaluation.suite, evaluation.samples
    )
    folder = EvaluationFolder.prepare(out, settings)
    with folder.locked():
        missing = folder.missing()
        if missing:
            _sample(evaluation, folder, missing, settings, screen)
        result = summarize(folder)
        folder.write_summary(result)
    return result | {"shards_sampled": len(missing)}


def _sample(
    evaluation: SuiteEvaluation,
    folder: EvaluationFolder,
    missing: list[int],
    settings: EvaluationSettings,
    screen: Console,
) -> None:
    from policy.errors import PolicyError
    from policy.registry import SLOW_TO_LOAD, check_files
    from services.cluster_room import require_room
    from services.demands import reward_demands, sampling_demand
    from services.driver import reward_places
    from services.ray_runtime import ray_cluster

    config, shard_prompts = evaluation.config, settings.shard_prompts
    try:
        check_files(config.model, at_least=SLOW_TO_LOAD)
    except PolicyError as error:
        raise ConfigError(str(error)) from error
    weights = evaluation.weights.resolve() if evaluation.weights is not None else None
    with (
        tempfile.TemporaryDirectory() as private,
        screen.status("starting the reward servers") as status,
        ray_cluster(config, queue=False) as own_ray,
        ExitStack() as serving,
    ):
        asked = [sampling_demand(config), *reward_demands(config)]
        require_room(config, asked, own_ray=own_ray, tell=status.update)
        places = serving.enter_context(reward_places(config, RunDirectory(Path(private)), own_ray))
        folder.check_scorers(_scorers(places))
        status.stop()
        work = SuiteWork(
            config=config,
            rewards=places,
            weights=weights,
            kind=evaluation.kind,
            digest=settings.weights,
            base_digest=evaluation.base_digest,
        )
        total = -(-len(evaluation.suite.prompts) // shard_prompts)
        with _progress(screen) as progress:
            bar = progress.add_task("shards", total=total, completed=total - len(missing))
            for made, images in _shards(evaluation, work, missing, shard_prompts):
                _keep(evaluation, folder, made, images, shard_prompts)
                progress.advance(bar)


def _shards(
    evaluation: SuiteEvaluation, work: SuiteWork, missing: list[int], shard_prompts: int
) -> Iterator[tuple[ShardScores, NDArray[np.uint8]]]:
    """Every missing shard, in the order in which they are done."""
    import ray

    from services.cluster_room import unplanned
    from services.config.placement import actor_options

    rollout, deadline_s = evaluation.config.rollout, evaluation.config.eval.deadline_s
    options = {
        **actor_options(rollout),
        "scheduling_strategy": unplanned(rollout),
        "max_restarts": rollout.max_restarts,
        "max_task_retries": rollout.max_restarts,
    }
    kind = ray.remote(SuiteWorker).options(**options)
    todo = deque(missing)
    workers = [kind.remote(work.model_dump_json()) for _ in range(min(rollout.workers, len(todo)))]
    running: dict[Any, tuple[Any, int]] = {}

    def give(worker: Any) -> None:
        if todo:
            number = todo.popleft()
            task = evaluation.task(number, shard_prompts).model_dump_json()
            running[worker.make.remote(task)] = worker, number

    try:
        for worker in workers:
            give(worker)
        while running:
            done, _ = ray.wait(list(running), num_returns=1, timeout=deadline_s)
            if not done:
                numbers = sorted(number for _, number in running.values())
                raise RuntimeError(
                    f"none of the shards {numbers} was done within {deadline_s:g} s (eval.deadline_s); what "
                    "is finished stays: has Ray room for rollout.num_cpus and num_gpus?"
                )
            worker, number = running.pop(done[0])
            try:
                images, made = ray.get(done[0])
            except ray.exceptions.RayError as error:
                raise RuntimeError(
                    f"shard {number} failed: {reason(error)}; finished shards stay, the same command goes on"
                ) from error
            give(worker)
            yield ShardScores.model_validate_json(made), images
    finally:
        for worker in workers:
            ray.kill(worker)


def _keep(
    evaluation: SuiteEvaluation,
    folder: EvaluationFolder,
    made: ShardScores,
    images: NDArray[np.uint8],
    shard_prompts: int,
) -> None:
    samples = samples_of(evaluation, made, shard_prompts)
    write_sheet(images, samples, folder.sheet(made.number), samples_a_prompt=evaluation.samples)
    if evaluation.keep_images:
        folder.keep_images(samples, images)
    # Last: what has this file is finished.
    folder.write_shard(made.number, samples)


def samples_of(evaluation: SuiteEvaluation, made: ShardScores, shard_prompts: int) -> list[Sample]:
    """The rows of a shard."""
    task, suite = evaluation.task(made.number, shard_prompts), evaluation.suite
    measures = _measures(made)
    rows = []
    for offset, (prompt, seeds) in enumerate(zip(task.prompts, task.seeds, strict=True)):
        place = made.number * shard_prompts + offset
        for sample, seed in enumerate(seeds):
            at = offset * evaluation.samples + sample
            rows.append(
                Sample(
                    place=place,
                    sample=sample,
                    seed=seed,
                    prompt=prompt.text,
                    tag=suite.tags[place],
                    scores={name: values[at] for name, values in measures.items()},
                    details={name: items[at] for name, items in made.details.items() if items},
                )
            )
    return rows


def _measures(made: ShardScores) -> dict[str, tuple[float, ...]]:
    """Scores, and rates of exact matches where a scorer tells of every image."""
    found = dict(made.rewards)
    for name, items in made.details.items():
        if items and all("exact" in item for item in items):
            found[f"{name}{EXACT}"] = tuple(float(item["exact"]) for item in items)
    return found


def _scorers(places: Mapping[str, RewardPlace]) -> dict[str, str]:
    """What scores, by reward; a server that does not say is left to the requests that follow."""
    told = {}
    for name, place in places.items():
        client = place.client(name)
        info = client.info()
        client.close()
        told[name] = UNKNOWN if info is None else f"{info.model}, version {info.version}"
    return told


def _progress(screen: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=screen,
    )
