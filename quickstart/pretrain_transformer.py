"""Second stage of pretraining: the transformer, by flow matching on captions that are partly wrong.

Promises
- Same steps and seed, same training data; the number of steps, never the clock, decides when it ends.
- Nothing held out is seen, neither in captions nor in images.
- What is left in the pipeline is the exponential moving average of the weights.
"""

import math
import random
from typing import Final

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor
from tqdm import tqdm, trange

from quickstart.base_model import UNCONDITIONAL_PROMPT, encode_prompts
from quickstart.pretrain_vae import encode, examples, render_batch
from quickstart.task import Example, Task

CONDITION_DROPOUT: Final = 0.1
PEAK_LEARNING_RATE: Final = 2e-3
WARMUP_STEPS: Final = 100
EMA_DECAY: Final = 0.998
CHUNK: Final = 1000


def train_transformer(pipeline: StableDiffusion3Pipeline, task: Task[Example], steps: int, seed: int) -> None:
    """Train `pipeline.transformer` in place; the other parts stay as they are."""
    torch.manual_seed(seed)
    latents, embeds, pooled = _data(pipeline, task, random.Random(f"{seed}/transformer"))
    empty_embeds, empty_pooled = encode_prompts(pipeline, [UNCONDITIONAL_PROMPT])
    transformer = pipeline.transformer.train()
    weights = list(transformer.parameters())
    averages = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=1e-3, fused=True)
    progress = trange(steps, desc="transformer", unit="step", mininterval=5)
    for step in progress:
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
        chosen = torch.randint(len(latents), (task.transformer_batch,))
        dropped = torch.rand(task.transformer_batch) < CONDITION_DROPOUT
        loss = flow_matching_loss(
            pipeline,
            latents[chosen],
            torch.where(dropped[:, None, None], empty_embeds, embeds[chosen]),
            torch.where(dropped[:, None], empty_pooled, pooled[chosen]),
            task.noise_shift,
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1 - decay)
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    with torch.no_grad():
        torch._foreach_copy_(weights, averages)
    transformer.eval().requires_grad_(False)


def flow_matching_loss(
    pipeline: StableDiffusion3Pipeline, x0: Tensor, embeds: Tensor, pooled: Tensor, noise_shift: float
) -> Tensor:
    """Mean squared error of the velocity noise - x0 at logit-normal noise levels (arXiv 2403.03206).

    Args:
        x0: (N, 4, H / 4, W / 4) clean latents.
        embeds: (N, tokens, width) text tokens; pooled: (N, pooled width).
        noise_shift: of the levels, as a scheduler's `shift`; above 1 there is more noise.
    """
    sigma = torch.sigmoid(torch.randn(len(x0)))
    sigma = noise_shift * sigma / (1 + (noise_shift - 1) * sigma)
    noise = torch.randn_like(x0)
    mixed = torch.lerp(x0, noise, sigma.view(-1, 1, 1, 1))
    velocity = pipeline.transformer(mixed, embeds, pooled, sigma * 1000, return_dict=False)[0]
    return F.mse_loss(velocity, noise - x0)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * cosine)


def _data(
    pipeline: StableDiffusion3Pipeline, task: Task[Example], rng: random.Random
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of rendered examples, and text tokens and pooled text of their captions."""
    vae: AutoencoderKL = pipeline.vae
    latents, embeds, pooled = [], [], []
    for _ in tqdm(range(0, task.images, CHUNK), desc="encoding", unit="chunk"):
        shown = examples(task, CHUNK, rng)
        latents.append(encode(vae, render_batch(task, shown, rng)))
        tokens, vector = encode_prompts(pipeline, [task.caption(example, rng) for example in shown])
        embeds.append(tokens)
        pooled.append(vector)
    # Clones: tensors made under inference mode cannot take part in autograd.
    return torch.cat(latents).clone(), torch.cat(embeds).clone(), torch.cat(pooled).clone()
