"""A random StableDiffusion3Pipeline in the real format, small enough to sample from in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from services.config import ModelConfig


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 x 64 images, latents 4 x 8 x 16, one T5 token; no weight is zero, so that each one matters."""
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    from quickstart import text_encoders

    torch.set_num_threads(1)
    torch.manual_seed(0)
    clip, t5 = text_encoders.new_clip_tokenizer(), text_encoders.new_t5_tokenizer()
    t5_encoder = text_encoders.new_t5_encoder(t5, 3)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=t5_encoder.config.d_model,
        caption_projection_dim=16,
        pooled_projection_dim=2 * text_encoders.CLIP_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    directory = tmp_path_factory.mktemp("tiny") / "sd3"
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoders.new_clip_encoder(clip, 1),
        tokenizer=clip,
        text_encoder_2=text_encoders.new_clip_encoder(clip, 2),
        tokenizer_2=clip,
        text_encoder_3=t5_encoder,
        tokenizer_3=t5,
    ).save_pretrained(directory)
    return directory


@pytest.fixture
def model_config(tiny_sd3: Path) -> ModelConfig:
    """The `model` section for `tiny_sd3`, every weight trained, on the CPU."""
    from services.config import ModelConfig

    return ModelConfig(
        path=str(tiny_sd3), train="full", device="cpu", max_sequence_length=1, height=32, width=64
    )
