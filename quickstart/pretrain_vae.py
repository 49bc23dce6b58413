"""First stage of pretraining: an autoencoder of a task's images, from nothing.

Promises
- Same steps and seed, same training data; the number of steps, never the clock, decides when it ends.
- `scaling_factor` and `shift_factor` of the returned autoencoder make its latents zero mean and unit variance
  over the ground truth.
- Decoding stays cheap: it runs once a sample on a CPU core, so the decoder is small where pixels are many.
"""

import random
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import trange

from quickstart.render import HEIGHT
from quickstart.task import Example, Task

PEAK_LEARNING_RATE: Final = 4e-3
LATENT_NOISE: Final = 0.05
"""Noise on the latents while training, so that the decoder forgives what a sampler leaves undone."""
STATISTICS_IMAGES: Final = 2000


def new_vae(height: int = HEIGHT) -> AutoencoderKL:
    """Four latent channels at a quarter of the resolution; 0.4 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=height,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def train_vae(task: Task[Example], steps: int, seed: int) -> AutoencoderKL:
    """Train an autoencoder on renders of a task and set its latent statistics."""
    torch.manual_seed(seed)
    rng = random.Random(f"{seed}/vae")
    vae = new_vae(task.height).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    progress = trange(steps, desc="autoencoder", unit="step", mininterval=5)
    for _ in progress:
        pixels = to_pixels(render_batch(task, examples(task, task.vae_batch, rng), rng))
        mean = vae.encode(pixels).latent_dist.mean
        decoded = vae.decode(mean + LATENT_NOISE * torch.randn_like(mean)).sample
        error = F.mse_loss(decoded, pixels) + 0.2 * F.l1_loss(decoded, pixels)
        loss = error + 1e-4 * mean.square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    vae.eval().requires_grad_(False)
    latents = encode(vae, render_batch(task, examples(task, STATISTICS_IMAGES, rng), rng))
    vae.register_to_config(scaling_factor=1.0 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


def examples(task: Task[Example], count: int, rng: random.Random) -> list[Example]:
    """`count` examples, none of them held out."""
    return [task.example(rng) for _ in range(count)]


def render_batch(task: Task[Example], shown: list[Example], rng: random.Random) -> Tensor:
    """(N, 3, H, W) uint8 images of `shown`, channels last in memory."""
    images = np.stack([task.render(example, rng) for example in shown])
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def to_pixels(images: Tensor) -> Tensor:
    """uint8 images as floats in -1..1, the range of the autoencoder."""
    return images.float() / 127.5 - 1.0


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents (N, 4, H/4, W/4) of uint8 `images` (N, 3, H, W), normalised by the factors of the config."""
    means = [vae.encode(to_pixels(part)).latent_dist.mean for part in torch.split(images, 100)]
    latents: Tensor = (torch.cat(means) - vae.config.shift_factor) * vae.config.scaling_factor
    return latents
