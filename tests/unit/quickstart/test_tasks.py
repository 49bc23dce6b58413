"""One pretraining for every task: its captions hold nothing that is held out, its models load plainly."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

import quickstart
from quickstart import pretrain_transformer, pretrain_vae
from quickstart.base_model import UNCONDITIONAL_PROMPT, encode_prompts, new_pipeline, new_transformer
from quickstart.pretrain import pretrain
from quickstart.pretrain_transformer import _data
from quickstart.pretrain_vae import new_vae
from quickstart.shapes.requests import any_request
from quickstart.shapes.task import VOCABULARY
from quickstart.task import TASKS, load_task
from quickstart.text_encoders import new_clip_tokenizer
from reward_servers.geneval.task import TAGS

MODEL = Path(quickstart.__file__).parent / "model"
SUMS = [391552.2917299264, 688903.402231141, 80319.1597606517]
"""Of the magnitudes of latents, text tokens and pooled text of the first 1000 images, seed 0."""


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    rng = random.Random(0)
    return [any_request(tag, rng).prompt for tag in TAGS for _ in range(30)]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_draws_and_captions_what_it_trains(name: str) -> None:
    task, rng = load_task(name), random.Random(0)
    tokenizer = new_clip_tokenizer(task.vocabulary)
    example = task.example(rng)
    image = task.render(example, rng)
    assert image.shape == (task.height, task.width, 3) and image.dtype == np.uint8
    assert task.height % 8 == 0 and task.width % 8 == 0 and task.images % 1000 == 0
    captions = [task.caption(example, random.Random(seed)) for seed in range(50)]
    assert 1 < len(set(captions)) < 50
    assert all(len(tokenizer(caption).input_ids) <= task.vocabulary.prompt_tokens for caption in captions)


def test_every_word_about_shapes_is_one_token_wherever_it_stands(prompts: list[str]) -> None:
    tokenizer = new_clip_tokenizer(VOCABULARY)
    number = {piece: tokenizer.convert_tokens_to_ids(piece) for piece in VOCABULARY.pieces}
    assert len(set(number.values())) == len(VOCABULARY.pieces)
    for prompt in prompts:
        tokens = tokenizer(prompt).input_ids[1:-1]
        spelt = [piece for token in tokens for piece in number if number[piece] == token]
        assert len(spelt) == len(tokens)  # nothing is unknown
        assert " ".join(spelt).replace(" es", "es").replace(" s ", "s ").replace(" ", "") == prompt.replace(
            " ", ""
        )


def test_text_about_shapes_has_unit_scale_and_tells_prompts_apart(prompts: list[str]) -> None:
    transformer = new_transformer(patches=4, width=32, vocabulary=VOCABULARY)
    pipeline = new_pipeline(transformer, new_vae(), seed=0, vocabulary=VOCABULARY)
    distinct = sorted(set(prompts))
    embeds, pooled = encode_prompts(pipeline, distinct)
    assert embeds.shape == (len(distinct), VOCABULARY.prompt_tokens + 1, VOCABULARY.joint_width)
    assert pooled.shape == (len(distinct), VOCABULARY.joint_width)
    assert 0.7 < embeds.std() < 1.3
    assert torch.pdist(embeds.flatten(1)).min() > 1.0
    _, swapped = encode_prompts(
        pipeline, ["a photo of a red star and a blue ring", "a photo of a blue star and a red ring"]
    )
    assert torch.dist(*swapped) > 1.0
    unconditional, _ = encode_prompts(pipeline, [UNCONDITIONAL_PROMPT])
    assert not torch.equal(unconditional[0], embeds[0])


def test_a_token_about_shapes_tells_the_word_to_its_left_and_the_relation_before_it() -> None:
    transformer = new_transformer(patches=4, width=32, vocabulary=VOCABULARY)
    pipeline = new_pipeline(transformer, new_vae(), seed=0, vocabulary=VOCABULARY)

    def changed(one: str, other: str) -> list[int]:
        first, second = encode_prompts(pipeline, [f"a photo of {one}", f"a photo of {other}"])[0]
        return (first - second).norm(dim=-1).gt(0.1).nonzero().flatten().tolist()

    # Places: start, template, colour, shape, relation, colour, shape, end.
    assert changed("a red star and a blue ring", "a pink star and a blue ring") == [2, 3]
    assert changed("a red star and a blue ring", "a red heart and a blue ring") == [3, 4]
    assert changed("a star above a ring", "a star below a ring") == [4, 5, 6, 7]


class Small:
    """A task with little to draw."""

    def __init__(self, name: str) -> None:
        self._task = load_task(name)
        self.images, self.vae_batch, self.vae_steps, self.transformer_steps = 20, 2, 1, 2

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


@pytest.mark.parametrize("name", TASKS)
def test_pretraining_makes_a_model_that_loads_plainly(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(pretrain_vae, "STATISTICS_IMAGES", 20)
    monkeypatch.setattr(pretrain_transformer, "CHUNK", 20)
    task: Any = Small(name)
    pretrain(task, seed=0, layers=1, heads=1).save_pretrained(tmp_path)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    caption = task.caption(task.example(random.Random(0)), random.Random(0))
    size = {"height": task.height, "width": task.width}
    image = pipeline(
        caption, **size, num_inference_steps=2, guidance_scale=1.0, max_sequence_length=1
    ).images[0]
    assert image.size == (task.width, task.height)
    assert pipeline.transformer.config.joint_attention_dim == task.vocabulary.joint_width


def test_the_text_quickstarts_training_data_are_those_of_its_model() -> None:
    """The pretraining of the shipped text model draws what it drew before it knew of tasks."""
    task: Any = Small("words")
    task.images = 1000
    transformer = new_transformer(1, 1)
    shipped = AutoencoderKL.from_pretrained(MODEL, subfolder="vae")
    latents, embeds, pooled = _data(
        new_pipeline(transformer, shipped, seed=0), task, random.Random("0/transformer")
    )
    assert latents.shape == (1000, 4, 8, 16)
    sums = [float(tensor.double().abs().sum()) for tensor in (latents, embeds, pooled)]
    assert sums == pytest.approx(SUMS, rel=1e-5)
