"""The text side of a base model: tokenizers and encoders of Stable Diffusion 3, very small.

Promises
- Every piece of a vocabulary is one token, the same token wherever it stands. Of the text quickstart's the
  template and each character are pieces: `K` is the same number in "KKKK" and in "7K", a word is therefore
  exactly four tokens.
- Encoders are frozen and made from a seed, not trained; their outputs have about unit variance, which is
  what the transformer expects. The pipeline takes the hidden states before the last layer: with one layer the
  transformer sees of a word its embedding and that of its place, with two its context as well.
- The T5 encoder is there because plain `from_pretrained` asks for one; it adds a single constant token when
  the pipeline is called with `max_sequence_length=1`.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from quickstart.words import CHARACTERS, TEMPLATE_PREFIX, TEMPLATE_SUFFIX, WORD_LENGTH

PROMPT_TOKENS: Final = WORD_LENGTH + 4
"""Of the text quickstart: start, template, the word, closing quote, end."""
CLIP_WIDTH: Final = 48
"""As many dimensions as there are places (8) and tokens (40), so that all of them can be orthogonal."""
POINTING: Final = 10.0
"""Makes the attention of a pointing head all but one-hot."""
CONTEXT: Final = 0.7
"""How strong a token's context is beside its own word and place."""


@dataclass(frozen=True)
class Vocabulary:
    """How the prompts of a task become tokens."""

    pieces: tuple[str, ...]
    """The texts that are tokens, where they overlap the longest one; anything else is the end token."""
    prompt_tokens: int
    """Of every prompt, start and end included; shorter prompts are filled up with end tokens."""
    watched: tuple[int, ...]
    """Places in the prompt that the pooled output depends on; as many divide `width`."""
    width: int
    """Of one CLIP encoder. At least `prompt_tokens` + pieces + 2, so that all of them can be orthogonal."""
    pivot: int | None = None
    """Place of the word that relates what stands before it to what stands behind. With one, a token tells the
    word to its left too, and behind the pivot the pivot: the context that a trained encoder puts in."""

    @property
    def joint_width(self) -> int:
        """Of the text tokens: both CLIP encoders side by side, and T5; and of the pooled text."""
        return 2 * self.width


WORDS: Final = Vocabulary(
    pieces=(TEMPLATE_PREFIX, TEMPLATE_SUFFIX, *CHARACTERS),
    prompt_tokens=PROMPT_TOKENS,
    watched=tuple(range(2, 2 + WORD_LENGTH)),
    width=CLIP_WIDTH,
)
"""Of the text quickstart."""
JOINT_WIDTH: Final = WORDS.joint_width
"""Width of its text tokens."""
POOLED_WIDTH: Final = WORDS.joint_width


def new_clip_tokenizer(vocabulary: Vocabulary = WORDS) -> CLIPTokenizer:
    """A CLIP tokenizer that knows the pieces of a vocabulary; anything else is the end token."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = CLIPTokenizer(vocab={start: 0, end: 1}, merges=[], model_max_length=vocabulary.prompt_tokens)
    # Added tokens are cut out before the tokenizer lower-cases and splits, so context cannot change them.
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in vocabulary.pieces])
    return tokenizer


def new_clip_encoder(
    tokenizer: CLIPTokenizer, seed: int, vocabulary: Vocabulary = WORDS
) -> CLIPTextModelWithProjection:
    """A frozen encoder: random, but for orthogonal embeddings and heads that point.

    Tokens and places are orthogonal to each other and have half the variance each. Each head of the last
    layer looks at one of the watched places alone, so that the pooled output depends on what stands where,
    and not only on the sum.
    """
    width, places = vocabulary.width, vocabulary.prompt_tokens
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=1 if vocabulary.pivot is None else 2,
        num_attention_heads=len(vocabulary.watched),
        max_position_embeddings=places,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 2:
            # The pooled output is read at the end token: a strong value path lets the rest outweigh it.
            strength = 2.0 if "v_proj" in name or "out_proj" in name else 1.0
            parameter.normal_(0.0, strength * width**-0.5, generator=generator)
    matrix = torch.empty(width, width)
    axes = torch.nn.init.orthogonal_(matrix, generator=generator)
    embeddings = encoder.text_model.embeddings
    scale = (width / 2) ** 0.5
    embeddings.position_embedding.weight.copy_(scale * axes[:places])
    embeddings.token_embedding.weight.copy_(scale * axes[places:][: len(tokenizer)])
    heads = [head * (width // len(vocabulary.watched)) for head in range(len(vocabulary.watched))]
    *context, last = encoder.text_model.encoder.layers
    last.self_attn.q_proj.weight.zero_()
    last.self_attn.k_proj.weight.zero_()
    for row, place in zip(heads, vocabulary.watched, strict=True):
        _point(last.self_attn, row, axes[place])
    for layer in context:
        assert vocabulary.pivot is not None
        attention = layer.self_attn
        attention.q_proj.weight.zero_()
        attention.k_proj.weight.zero_()
        torch.nn.init.orthogonal_(attention.v_proj.weight, generator=generator)
        torch.nn.init.orthogonal_(attention.out_proj.weight, gain=CONTEXT, generator=generator)
        layer.mlp.fc2.weight.zero_()
        # More of the heads look left, where there is more to tell.
        pivots = len(heads) // 2
        for row in heads[:pivots]:
            _point(attention, row, axes[vocabulary.pivot])
        for row in heads[pivots:]:
            _look_left(attention, row, axes[:places])
    return encoder


def _point(attention: Any, row: int, axis: Tensor) -> None:
    """The head that begins at `row` looks at the place of that axis, from wherever it can be seen."""
    attention.q_proj.bias[row] = POINTING
    attention.k_proj.weight[row] = axis


def _look_left(attention: Any, row: int, axes: Tensor) -> None:
    """The head that begins at `row` looks at the place before its own; it needs a channel for each place."""
    assert len(axes) <= attention.head_dim
    end = row + len(axes)
    attention.q_proj.weight[row:end] = axes * POINTING**0.5
    attention.k_proj.weight[row + 1 : end] = axes[:-1] * POINTING**0.5


def new_t5_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for the T5 encoder that takes every prompt for the empty one, the end token alone.

    Not a `T5Tokenizer`: that one would keep the words, and the pipeline would warn of each prompt that it
    cuts down to `max_sequence_length=1`.
    """
    backend = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}, unk_token="</s>"))
    backend.normalizer = Replace(Regex("."), "")
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", model_max_length=1
    )


def new_t5_encoder(
    tokenizer: PreTrainedTokenizerFast, seed: int, vocabulary: Vocabulary = WORDS
) -> T5EncoderModel:
    """A frozen random encoder of one layer; its final norm gives unit variance by itself."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=vocabulary.joint_width,
        d_kv=8,
        d_ff=8,
        num_layers=1,
        num_heads=1,
        is_encoder_decoder=False,
        use_cache=False,
    )
    encoder = T5EncoderModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in encoder.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0.0, 1.0 if parameter.shape[0] == len(tokenizer) else 0.1, generator=generator)
    return encoder
