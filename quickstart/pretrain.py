"""Makes a base model from nothing: `python -m quickstart.pretrain --out quickstart/model`, or, for the
shapes task, `python -m quickstart.pretrain --task shapes --out DIR`.

Promises
- Takes its number of steps from the task, never from the clock, and every random number from `--seed`:
  whoever runs it gets a model of the same quality.
- `--out` then holds a pipeline that plain `StableDiffusion3Pipeline.from_pretrained` loads.

How good it is: `dgpo eval OUT --recipe quickstart`.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from quickstart.base_model import HEADS, LAYERS, new_pipeline, new_transformer
from quickstart.pretrain_transformer import train_transformer
from quickstart.pretrain_vae import train_vae
from quickstart.task import TASKS, Task, load_task


def pretrain(
    task: Task[Any],
    seed: int,
    vae_steps: int | None = None,
    transformer_steps: int | None = None,
    vae: AutoencoderKL | None = None,
    *,
    layers: int = LAYERS,
    heads: int = HEADS,
) -> StableDiffusion3Pipeline:
    """Train an autoencoder, unless one is given, and then a transformer on its latents.

    Args:
        vae_steps: None for the task's own number, as `transformer_steps`.
    """
    if vae is None:
        vae = train_vae(task, task.vae_steps if vae_steps is None else vae_steps, seed)
    torch.manual_seed(seed)
    side = max(task.height, task.width)
    transformer = new_transformer(
        layers,
        heads,
        patches=side // (4 * task.patch),
        width=side,
        patch=task.patch,
        vocabulary=task.vocabulary,
    )
    pipeline = new_pipeline(transformer, vae, seed, task.vocabulary)
    train_transformer(
        pipeline, task, task.transformer_steps if transformer_steps is None else transformer_steps, seed
    )
    return pipeline


def main() -> None:
    """Parse the command line, pretrain, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="directory of the pipeline")
    parser.add_argument("--task", choices=TASKS, default="words")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--vae-steps", type=int, help="of the autoencoder; the task's own by default")
    parser.add_argument("--steps", type=int, help="of the transformer; the task's own by default")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the transformer")
    parser.add_argument("--heads", type=int, default=HEADS, help="of the transformer, 32 channels each")
    parser.add_argument("--vae", type=Path, help="take the autoencoder of this pipeline directory")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    vae = AutoencoderKL.from_pretrained(arguments.vae, subfolder="vae") if arguments.vae else None
    pipeline = pretrain(
        load_task(arguments.task),
        arguments.seed,
        arguments.vae_steps,
        arguments.steps,
        vae,
        layers=arguments.layers,
        heads=arguments.heads,
    )
    pipeline.save_pretrained(arguments.out)
    minutes = (time.perf_counter() - began) / 60
    sys.stdout.write(f"made {arguments.out} in {minutes:.1f} minutes\n")


if __name__ == "__main__":
    main()
