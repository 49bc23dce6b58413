import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from PIL import Image

import quickstart
from quickstart.base_model import UNCONDITIONAL_PROMPT, encode_prompts, new_pipeline, new_transformer
from quickstart.pretrain_vae import new_vae
from quickstart.render import render
from quickstart.text_encoders import JOINT_WIDTH, POOLED_WIDTH, PROMPT_TOKENS, new_clip_tokenizer
from quickstart.words import CHARACTERS, TEMPLATE_PREFIX, heldout_words, prompt_of
from reward_servers.scorers import ocr
from reward_servers.wire import ScoreCall

SHIPPED = Path(quickstart.__file__).parent / "model"
SIZE_LIMIT = 10_000_000


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pipeline")
    new_pipeline(new_transformer(), new_vae(), seed=0).save_pretrained(directory)
    return directory


def test_a_character_is_the_same_token_at_every_place() -> None:
    tokenizer = new_clip_tokenizer()
    number = {character: tokenizer.convert_tokens_to_ids(character) for character in CHARACTERS}
    assert len(set(number.values())) == len(CHARACTERS)
    rng = random.Random(0)
    words = [character * 4 for character in CHARACTERS] + heldout_words(200, seed=0)
    words += ["".join(rng.choices(CHARACTERS, k=4)) for _ in range(200)]
    template = tokenizer.convert_tokens_to_ids(TEMPLATE_PREFIX)
    for word in words:
        tokens = tokenizer(prompt_of(word)).input_ids
        assert len(tokens) == PROMPT_TOKENS
        assert tokens[1] == template
        assert tokens[2:6] == [number[character] for character in word]


def test_text_has_unit_scale_and_tells_words_apart(saved: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(saved)
    words = heldout_words(100, seed=0)
    embeds, pooled = encode_prompts(pipeline, [prompt_of(word) for word in words])
    assert embeds.shape == (100, PROMPT_TOKENS + 1, JOINT_WIDTH)
    assert pooled.shape == (100, POOLED_WIDTH)
    assert 0.7 < embeds.std() < 1.3
    assert torch.pdist(embeds.flatten(1)).min() > 1.0
    assert pooled.std(dim=0).mean() > 0.2
    _, anagrams = encode_prompts(pipeline, [prompt_of("ABCD"), prompt_of("BACD")])
    assert torch.dist(*anagrams) > 1.0
    unconditional, _ = encode_prompts(pipeline, [UNCONDITIONAL_PROMPT])
    assert not torch.equal(unconditional[0], embeds[0])


def test_plain_from_pretrained_makes_an_image(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(saved)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(
        prompt_of("K7QX"),
        height=32,
        width=64,
        num_inference_steps=2,
        guidance_scale=1.0,
        max_sequence_length=1,
    )
    assert output.images[0].size == (64, 32)
    assert not [record for record in caplog.records if "truncated" in record.message]


def test_an_untrained_transformer_has_zero_velocity() -> None:
    velocity = new_transformer()(
        torch.randn(1, 4, 8, 16),
        torch.randn(1, PROMPT_TOKENS + 1, JOINT_WIDTH),
        torch.randn(1, POOLED_WIDTH),
        torch.tensor([500.0]),
        return_dict=False,
    )[0]
    assert not velocity.any()


def test_the_shipped_model_is_small_loads_plainly_and_has_colours() -> None:
    size = sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file())
    assert size < SIZE_LIMIT
    pipeline = StableDiffusion3Pipeline.from_pretrained(SHIPPED)
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = pipeline(
        [prompt_of(word) for word in heldout_words(32, seed=0)],
        height=32,
        width=64,
        num_inference_steps=10,
        guidance_scale=1.0,
        max_sequence_length=1,
        generator=torch.Generator().manual_seed(0),
    ).images
    pixels = np.stack([np.asarray(image, dtype=np.float64) for image in images])
    assert pixels.shape == (32, 32, 64, 3)
    assert pixels.mean(axis=(1, 2)).std(axis=0).min() > 8.0


def test_the_shipped_autoencoder_keeps_words_readable() -> None:
    vae = AutoencoderKL.from_pretrained(SHIPPED, subfolder="vae")
    words, rng = heldout_words(64, seed=0), random.Random(0)
    pixels = torch.from_numpy(np.stack([render(word, rng) for word in words])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    images = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    call = ScoreCall(list(images), [prompt_of(word) for word in words], [{} for _ in words])
    read = ocr.create({}, 1).score(call)
    assert np.mean([item.score for item in read]) >= 0.98
    assert np.mean([item.details["exact"] for item in read]) >= 0.95
