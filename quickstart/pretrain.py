"""Makes the base model from nothing: `python -m quickstart.pretrain --out quickstart/model`.

Promises
- Takes its number of steps from `VAE_STEPS` and `TRANSFORMER_STEPS`, never from the clock, and every random
  number from `--seed`: whoever runs it gets a model of the same quality.
- Ends by measuring what it made on held-out words and prints it; `--out` then holds a pipeline that plain
  `StableDiffusion3Pipeline.from_pretrained` loads.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from quickstart.base_model import new_pipeline, new_transformer
from quickstart.diversity import diversity
from quickstart.measure import measure
from quickstart.pretrain_transformer import train_transformer
from quickstart.pretrain_vae import train_vae
from quickstart.read import Recognizer
from quickstart.words import heldout_words

VAE_STEPS: Final = 900
TRANSFORMER_STEPS: Final = 1600
MEASURED_WORDS: Final = 320
MEASURE_SEED: Final = 0
GUIDANCES: Final = (1.0, 4.0)


def pretrain(
    seed: int, vae_steps: int, transformer_steps: int, vae: AutoencoderKL | None = None
) -> StableDiffusion3Pipeline:
    """Train an autoencoder, unless one is given, and then a transformer on its latents."""
    if vae is None:
        vae = train_vae(vae_steps, seed)
    torch.manual_seed(seed)
    pipeline = new_pipeline(new_transformer(), vae, seed)
    train_transformer(pipeline, transformer_steps, seed)
    return pipeline


def quality(pipeline: StableDiffusion3Pipeline, threads: int) -> dict[str, dict[str, float]]:
    """Reward, exact matches and diversity on held-out words, by guidance."""
    recognizer = Recognizer(threads)
    words = heldout_words(MEASURED_WORDS, MEASURE_SEED)
    measured: dict[str, dict[str, float]] = {}
    for guidance in GUIDANCES:
        reading, images = measure(pipeline, recognizer, words, seed=MEASURE_SEED, guidance=guidance)
        measured[f"guidance_{guidance:g}"] = {**reading._asdict(), **diversity(images)}
    return measured


def main() -> None:
    """Parse the command line, pretrain, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="directory of the pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of the reader")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--steps", type=int, default=TRANSFORMER_STEPS, help="transformer steps")
    parser.add_argument("--vae", type=Path, help="take the autoencoder of this pipeline directory")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    vae = AutoencoderKL.from_pretrained(arguments.vae, subfolder="vae") if arguments.vae else None
    pipeline = pretrain(arguments.seed, arguments.vae_steps, arguments.steps, vae)
    pipeline.save_pretrained(arguments.out)
    minutes = (time.perf_counter() - began) / 60
    report = {"minutes": round(minutes, 1), **quality(pipeline, arguments.threads)}
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
