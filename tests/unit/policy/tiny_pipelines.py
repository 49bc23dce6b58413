"""Random pipelines of every family in the real format: the real classes, a few thousand weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_tokenizers import CLIP_LENGTH, clip_tokenizer, gemma_tokenizer, qwen_tokenizer, t5_tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from services.config import LoraConfig, ModelConfig, RolloutConfig

WIDTH = 16
"""Of every text encoder."""


@dataclass(frozen=True)
class Tiny:
    """A family under test."""

    pipeline: type[DiffusionPipeline]
    build: Callable[[Path], None]
    rollout: dict[str, Any]
    """What `stock_rollout` must say of it."""
    tolerance: int = 0
    """By which images may differ from the stock pipeline's, of 255."""
    rounding: float = 2.0
    """By which images may differ in bfloat16, in the mean, of 255."""
    dropped: str = "vae"
    """A component without which nothing goes."""
    absent: tuple[str, ...] = ()
    """Components that it lacks, and of which the stock pipeline has to be told."""

    def config(self, directory: Path, **changes: Any) -> ModelConfig:
        settings: dict[str, Any] = {
            "path": str(directory),
            "lora": LoraConfig(rank=4, alpha=6),
            "device": "cpu",
            "max_sequence_length": 12,
            "height": 32,
            "width": 64,
        }
        return ModelConfig(**settings | changes)

    def sampling(self, **changes: Any) -> RolloutConfig:
        return RolloutConfig(**({"group_size": 2, "steps": 3} | self.rollout | changes))


def disturbed(module: torch.nn.Module, seed: int, scale: float = 0.1) -> Any:
    """No weight is zero, so that each one matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()


def autoencoder(**settings: Any) -> AutoencoderKL:
    """Four pixels of a side are one latent."""
    return disturbed(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=32,
            latent_channels=4,
            **settings,
        ),
        1,
    )


def clip(projected: bool, seed: int) -> Any:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return disturbed((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), seed, 0.3)


def t5(seed: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=2 * WIDTH,
        d_kv=8,
        d_ff=WIDTH,
        num_layers=1,
        num_heads=2,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return disturbed(T5EncoderModel(config), seed, 0.3)


def build_sd3(directory: Path, *, with_t5: bool = True, **settings: Any) -> None:
    settings = {"qk_norm": "rms_norm"} | settings
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
        **settings,
    )
    StableDiffusion3Pipeline(
        transformer=disturbed(transformer, 2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=0.7, shift_factor=0.1),
        text_encoder=clip(True, 3),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(True, 4),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(5) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    ).save_pretrained(directory)


def build_sd35_medium(directory: Path) -> None:
    build_sd3(directory, dual_attention_layers=(0,))


def build_sd3_medium(directory: Path) -> None:
    build_sd3(directory, qk_norm=None)


def build_sd3_without_t5(directory: Path) -> None:
    build_sd3(directory, with_t5=False, dual_attention_layers=(0,))


def build_flux(directory: Path, *, guidance_embeds: bool = True) -> None:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    FluxPipeline(
        transformer=disturbed(transformer, 2),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
        vae=autoencoder(scaling_factor=0.7, shift_factor=0.1),
        text_encoder=clip(False, 3),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(5),
        tokenizer_2=t5_tokenizer(),
    ).save_pretrained(directory)


def build_flux_schnell(directory: Path) -> None:
    build_flux(directory, guidance_embeds=False)


def build_qwen(directory: Path) -> None:
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.0, 2.0],
    )
    tokenizer = qwen_tokenizer()
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH}
    config = Qwen2_5_VLConfig(
        text_config={
            **sizes,
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        },
        vision_config={**sizes, "depth": 1, "num_heads": 2, "out_hidden_size": WIDTH},
    )
    QwenImagePipeline(
        transformer=disturbed(transformer, 2),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=disturbed(vae, 1),
        text_encoder=disturbed(Qwen2_5_VLForConditionalGeneration(config), 3),
        tokenizer=tokenizer,
    ).save_pretrained(directory)


def build_sana(directory: Path, **settings: Any) -> None:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=16,
        **settings,
    )
    blocks = {
        f"{side}_{what}": value
        for side in ("encoder", "decoder")
        for what, value in {
            "block_types": ("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 8, 8),
            "qkv_multiscales": ((), (5,), (5,)),
            "layers_per_block": (1, 1, 1),
        }.items()
    }
    vae = AutoencoderDC(in_channels=3, latent_channels=4, attention_head_dim=2, scaling_factor=0.4, **blocks)
    tokenizer = gemma_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    SanaPipeline(
        transformer=disturbed(transformer, 2),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=disturbed(vae, 1),
        text_encoder=disturbed(Gemma2Model(config), 3),
        tokenizer=tokenizer,
    ).save_pretrained(directory)


def build_sana15(directory: Path) -> None:
    build_sana(directory, qk_norm="rms_norm_across_heads")


def build_sdxl(directory: Path) -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=1,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        cross_attention_dim=2 * WIDTH,
        norm_num_groups=4,
    )
    StableDiffusionXLPipeline(
        unet=disturbed(unet, 2),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=clip(False, 3),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(True, 4),
        tokenizer_2=clip_tokenizer(),
    ).save_pretrained(directory)


FRACTIONS = {"solver": "euler", "sigmas": "fractions"}
# mu of 32 tokens, by the stock formula.
FLUX = FRACTIONS | {"shift": math.exp(0.5 + (32 - 256) * (1.15 - 0.5) / (4096 - 256))}
QWEN = FRACTIONS | {"shift": math.exp(0.5 + (32 - 256) * (0.9 - 0.5) / (8192 - 256)), "terminal": 0.02}
SD3 = {"solver": "euler", "sigmas": "scheduler", "shift": 3.0}
SANA = {"solver": "dpmsolver++", "shift": 3.0}
TINY = {
    "sd3.5-medium": Tiny(StableDiffusion3Pipeline, build_sd35_medium, SD3),
    "flux-dev": Tiny(FluxPipeline, build_flux, FLUX, dropped="text_encoder_2"),
    "flux-schnell": Tiny(FluxPipeline, build_flux_schnell, FLUX),
    "qwen-image": Tiny(QwenImagePipeline, build_qwen, QWEN, dropped="tokenizer"),
    "sana": Tiny(SanaPipeline, build_sana, SANA, dropped="text_encoder", rounding=4.0),
    "sdxl": Tiny(
        StableDiffusionXLPipeline,
        build_sdxl,
        {"solver": "euler", "sigmas": "vp", "shift": 1.0},
        dropped="unet",
        tolerance=1,
    ),
}
VARIANTS = {
    "sd3": Tiny(StableDiffusion3Pipeline, build_sd3_medium, SD3),
    "sd3.5-large": Tiny(StableDiffusion3Pipeline, build_sd3, SD3),
    "sd3.5-without-t5": Tiny(
        StableDiffusion3Pipeline, build_sd3_without_t5, SD3, absent=("text_encoder_3", "tokenizer_3")
    ),
    "sana1.5": Tiny(SanaPipeline, build_sana15, SANA),
}
"""Other models of these families: only tests in which they may differ run on them."""
