"""How good a pipeline is at the task: words sampled with the rollout's solver and read back.

Promises
- Same pipeline, words, seed and guidance: same images.
- The solver is DPM-Solver++ 2M with a flow shift of 3 and 10 steps, that of the quickstart's rollout.
"""

from typing import Final, NamedTuple

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusion3Pipeline
from numpy.typing import NDArray

from quickstart.base_model import FLOW_SHIFT, UNCONDITIONAL_PROMPT, encode_prompts
from quickstart.pretrain_vae import decode
from quickstart.read import Reading, Recognizer
from quickstart.words import prompt_of

SOLVER_STEPS: Final = 10
LATENT_SHAPE: Final = (4, 8, 16)


class Measurement(NamedTuple):
    """A reading and the images that were read, (N, H, W, 3)."""

    reading: Reading
    images: NDArray[np.uint8]


def measure(
    pipeline: StableDiffusion3Pipeline,
    recognizer: Recognizer,
    words: list[str],
    *,
    seed: int,
    guidance: float = 1.0,
) -> Measurement:
    """Sample one image a word and read it."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(words), *LATENT_SHAPE, generator=generator)
    images = decode(pipeline.vae, sample(pipeline, words, noise, guidance))
    return Measurement(recognizer.score(images, words), images)


@torch.inference_mode()
def sample(
    pipeline: StableDiffusion3Pipeline, words: list[str], noise: torch.Tensor, guidance: float
) -> torch.Tensor:
    """Solve the flow from `noise` (N, 4, 8, 16) to latents of the same shape."""
    embeds, pooled = encode_prompts(pipeline, [prompt_of(word) for word in words])
    empty_embeds, empty_pooled = encode_prompts(pipeline, [UNCONDITIONAL_PROMPT])
    scheduler = new_solver()
    latents = noise
    for timestep in scheduler.timesteps:
        times = timestep.float().expand(len(words))
        velocity = pipeline.transformer(latents, embeds, pooled, times, return_dict=False)[0]
        if guidance != 1.0:
            free = pipeline.transformer(
                latents,
                empty_embeds.expand_as(embeds),
                empty_pooled.expand_as(pooled),
                times,
                return_dict=False,
            )[0]
            velocity = free + guidance * (velocity - free)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def new_solver() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ 2M for flow matching, its timesteps set."""
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
        lower_order_final=True,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(SOLVER_STEPS)
    return scheduler
