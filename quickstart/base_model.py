"""A base model as a whole: a Stable Diffusion 3 pipeline small enough for two CPU cores.

Promises
- What `save_pretrained` writes, plain `StableDiffusion3Pipeline.from_pretrained(directory)` loads.
- The transformer starts as adaLN-zero: its velocity is 0 everywhere until it is trained.
"""

from collections.abc import Sequence
from typing import Final

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from quickstart.render import WIDTH
from quickstart.text_encoders import (
    WORDS,
    Vocabulary,
    new_clip_encoder,
    new_clip_tokenizer,
    new_t5_encoder,
    new_t5_tokenizer,
)

FLOW_SHIFT: Final = 3.0
LAYERS: Final = 4
HEADS: Final = 3
WIDTH_OF_HEAD: Final = 32
PATCHES: Final = 8
UNCONDITIONAL_PROMPT: Final = ""


def new_transformer(
    layers: int = LAYERS,
    heads: int = HEADS,
    patches: int = PATCHES,
    *,
    width: int = WIDTH,
    patch: int = 2,
    vocabulary: Vocabulary = WORDS,
) -> SD3Transformer2DModel:
    """An untrained transformer; as it is by default: 4 layers, width 96, 1.3 M parameters.

    Args:
        layers: joint attention blocks.
        heads: of 32 channels each.
        patches: the largest height or width, in patches.
        width: of an image in pixels, the larger side.
        patch: side of a patch in latents, of 4 x 4 pixels each.
        vocabulary: of the text that it is conditioned on.
    """
    transformer = SD3Transformer2DModel(
        sample_size=width // 4,
        patch_size=patch,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=WIDTH_OF_HEAD,
        joint_attention_dim=vocabulary.joint_width,
        caption_projection_dim=heads * WIDTH_OF_HEAD,
        pooled_projection_dim=vocabulary.joint_width,
        pos_embed_max_size=patches,
        qk_norm="rms_norm",
    )
    gates = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        gates += [block.norm1.linear, block.norm1_context.linear]
    for layer in gates:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return transformer


def new_pipeline(
    transformer: SD3Transformer2DModel, vae: AutoencoderKL, seed: int, vocabulary: Vocabulary = WORDS
) -> StableDiffusion3Pipeline:
    """Put text encoders made from `seed` beside a transformer and an autoencoder."""
    clip_tokenizer, t5_tokenizer = new_clip_tokenizer(vocabulary), new_t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        text_encoder=new_clip_encoder(clip_tokenizer, seed=3 * seed, vocabulary=vocabulary),
        tokenizer=clip_tokenizer,
        text_encoder_2=new_clip_encoder(clip_tokenizer, seed=3 * seed + 1, vocabulary=vocabulary),
        tokenizer_2=new_clip_tokenizer(vocabulary),
        text_encoder_3=new_t5_encoder(t5_tokenizer, seed=3 * seed + 2, vocabulary=vocabulary),
        tokenizer_3=t5_tokenizer,
    )


@torch.inference_mode()
def encode_prompts(
    pipeline: StableDiffusion3Pipeline, prompts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text tokens (N, prompt tokens + 1, joint width) and pooled text (N, joint width) of `prompts`."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompt=list(prompts),
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        max_sequence_length=1,
    )
    return embeds, pooled
