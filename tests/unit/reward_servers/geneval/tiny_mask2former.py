"""A Mask2Former with a Swin backbone, random and tiny, of the classes of the published detector."""

from __future__ import annotations

import pytest
import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former import modeling_mask2former

QUERIES = 6


def new_mask2former(labels: int = 80) -> Mask2FormerForUniversalSegmentation:
    """In evaluation mode; classes, masks and boxes differ from query to query and from image to image."""
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=8,
        dim_feedforward=8,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=QUERIES,
        num_labels=labels,
    )
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        # Its loss insists on scipy, which nothing here calls.
        patch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)
        network = Mask2FormerForUniversalSegmentation(config).eval()
    generator = torch.Generator().manual_seed(3)
    weights = dict(network.named_parameters())
    embedder = "model.transformer_module.decoder.mask_predictor.mask_embedder.2.0"
    features = "model.pixel_level_module.decoder.mask_projection"
    with torch.no_grad():
        for name, weight in weights.items():
            if "class_predictor" in name or "mask_embedder" in name:
                scale = 1.0 if "class_predictor" in name else 0.25
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        weights[f"{features}.weight"].mul_(4)
        # One channel lowers all mask logits alike, so that masks are parts of the image.
        weights[f"{embedder}.weight"][0] = weights[f"{features}.weight"][0] = 0
        weights[f"{embedder}.bias"][0] = 1
        weights[f"{features}.bias"][0] = -3
    return network
