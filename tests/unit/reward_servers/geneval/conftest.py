"""Tiny random checkpoints of the detector and of CLIP, in the formats of the published ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, Mask2FormerForUniversalSegmentation

from tests.unit.reward_servers.geneval.tiny_mask2former import new_mask2former
from tests.unit.reward_servers.networks.tiny_clip import architecture, randomise, save_tokenizer


@pytest.fixture(scope="session")
def mask2former() -> Mask2FormerForUniversalSegmentation:
    torch.set_num_threads(1)
    return new_mask2former()


@pytest.fixture(scope="session")
def detector_folder(
    mask2former: Mask2FormerForUniversalSegmentation, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("mask2former")
    mask2former.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    network = CLIPModel(CLIPConfig(**architecture())).eval()
    randomise(network, seed=5)
    text, vision = network.text_model.embeddings, network.vision_model.embeddings
    with torch.no_grad():
        # What all inputs share would drown what sets them apart: every object would be of one colour.
        for weight in (text.position_embedding.weight, vision.position_embedding.weight):
            weight.mul_(0.1)
        text.token_embedding.weight[-1] = vision.class_embedding[:] = 0
        for name, weight in network.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif "norm" in name:
                weight.fill_(1)
    network.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
