"""What sampling and an update cost, in forward passes of one sample, by objective and model.

A forward pass with gradients counts 3: the backward pass does about twice its work. Passes are counted where
the transformer is called; seconds are told in units of one forward pass without gradients of the same batch.
Models other than the quickstart's have random weights: what a pass costs does not depend on them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from learner.update import TrainingGroup, Updater
from policy import load_policy
from policy.base import Policy
from quickstart.base_model import new_pipeline, new_transformer
from rollout_workers.sampling import sample_trajectory
from services.config import Config
from services.config_file import find, load_config

OBJECTIVES = {
    "DGPO": "quickstart",
    "Flow-GRPO": "quickstart-flow-grpo",
    "DiffusionNFT": "quickstart-diffusion-nft",
}
GROUPS = 2
ROUNDS = 3
PROMPT = 'a sign that says "K7QX"'


@dataclass(frozen=True)
class Shape:
    """A model and the images it makes."""

    name: str
    layers: int = 4
    heads: int = 3
    scale: int = 1
    """Height and width of the images, in those of the quickstart (32 x 64)."""

    @property
    def overrides(self) -> list[str]:
        return [f"model.height={32 * self.scale}", f"model.width={64 * self.scale}"]


SHAPES = (
    Shape("quickstart"),
    Shape("twice the width", heads=6),
    Shape("4 x the pixels", scale=2),
    Shape("2 x width, layers; 4 x pixels", layers=8, heads=6, scale=2),
)


class PassCounter:
    """Counts the samples that go through a policy's transformer; those with gradients three times."""

    def __init__(self, policy: Policy) -> None:
        self.passes = 0
        policy.transformer.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        samples = (named["hidden_states"] if "hidden_states" in named else arguments[0]).shape[0]
        self.passes += samples * (3 if torch.is_grad_enabled() else 1)


def run_cost_bench(screen: Console | None = None) -> dict[str, Any]:
    """Forward passes and time of sampling and of an update, for each image, by model and objective.

    Returns:
        `shapes`: for each model `forward_ms`, milliseconds of a forward pass of one sample in a batch, and
        for each objective, an image, `sample_passes` and `update_passes` as counted, `sample_time` and
        `update_time` as timed in forward passes; all on one thread.
    """
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    shapes = {}
    for shape in track(SHAPES, "measuring", console=screen or Console(stderr=True), transient=True):
        with tempfile.TemporaryDirectory() as folder:
            shapes[shape.name] = _measured(shape, _made(shape, Path(folder)))
    result = {"benchmark": "cost", "rounds": ROUNDS, "shapes": shapes}
    if screen is not None:
        screen.print(_table(shapes))
    return result


def _made(shape: Shape, folder: Path) -> Path:
    if shape == SHAPES[0]:
        return find("quickstart/model")
    torch.manual_seed(0)
    transformer = new_transformer(shape.layers, shape.heads, patches=8 * shape.scale)
    vae = AutoencoderKL.from_pretrained(find("quickstart/model"), subfolder="vae")
    new_pipeline(transformer, vae, seed=0).save_pretrained(folder)
    return folder


def _measured(shape: Shape, model: Path) -> dict[str, Any]:
    jobs: dict[str, dict[str, Callable[[], None]]] = {}
    counts: dict[str, dict[str, float]] = {}
    for name, recipe in OBJECTIVES.items():
        config = load_config(
            recipe, [*shape.overrides, f"model.path={model}", f"learner.groups_per_step={GROUPS}"]
        )
        policy = load_policy(config.model, text_encoders=True, vae=False, seed=0)
        counter = PassCounter(policy)
        jobs[name] = _jobs(policy, config)
        counts[name] = {}
        for what, job in jobs[name].items():
            before = counter.passes
            job()
            counts[name][what] = (counter.passes - before) / (GROUPS * config.rollout.group_size)
    images = GROUPS * config.rollout.group_size
    forward = _forward(policy, images)
    seconds: dict[tuple[str, str], list[float]] = {(name, what): [] for name in jobs for what in jobs[name]}
    passes = []
    for _ in range(ROUNDS):
        passes.append(_seconds(forward))
        for (name, what), found in seconds.items():
            found.append(_seconds(jobs[name][what]))
    unit = statistics.median(passes)
    objectives = {
        name: {
            **{f"{what}_passes": counts[name][what] for what in jobs[name]},
            **{f"{what}_time": statistics.median(seconds[name, what]) / unit for what in jobs[name]},
        }
        for name in jobs
    }
    return {"forward_ms": 1000 * unit / images, "objectives": objectives}


def _jobs(policy: Policy, config: Config) -> dict[str, Callable[[], None]]:
    """One group after another as a rollout worker samples them, and one update of all."""
    updater, condition = Updater(policy, config), policy.encode(PROMPT)
    size = config.rollout.group_size
    step = 0

    def sampled(ordinal: int) -> TrainingGroup:
        seeds = range(ordinal * size, (ordinal + 1) * size)
        latents, trajectory = sample_trajectory(policy, condition, None, seeds, config.rollout)
        return TrainingGroup(
            ordinal=ordinal,
            latents=latents,
            rewards={"ocr": torch.linspace(0, 1, size).tolist()},
            condition=condition,
            trajectory=None if trajectory is None else trajectory.points,
            log_likelihoods=None if trajectory is None else trajectory.log_likelihoods,
        )

    groups = [sampled(ordinal) for ordinal in range(GROUPS)]

    def sample() -> None:
        for ordinal in range(GROUPS):
            sampled(ordinal)

    def update() -> None:
        nonlocal step
        updater.step(groups, step)
        step += 1

    return {"sample": sample, "update": update}


def _forward(policy: Policy, images: int) -> Callable[[], None]:
    condition = policy.encode(PROMPT)
    x = torch.randn((images, *policy.latent_shape()), generator=torch.Generator().manual_seed(0))

    def forward() -> None:
        with torch.inference_mode():
            policy.velocity(x, torch.tensor(500.0), condition)

    forward()
    return forward


def _seconds(job: Callable[[], None]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def _table(shapes: dict[str, Any]) -> Table:
    table = Table(
        title="cost of an image, in forward passes of one sample: counted (timed)",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for heading in ("model", "objective", "sampling", "update", "both, timed"):
        table.add_column(heading, justify="left" if heading in ("model", "objective") else "right")
    for name, shape in shapes.items():
        for number, (objective, cost) in enumerate(shape["objectives"].items()):
            table.add_row(
                f"{name}\n{shape['forward_ms']:.2f} ms a pass" if number == 0 else "",
                objective,
                *(
                    f"{cost[f'{what}_passes']:.1f} ({cost[f'{what}_time']:.1f})"
                    for what in ("sample", "update")
                ),
                f"{cost['sample_time'] + cost['update_time']:.1f}",
            )
    return table
