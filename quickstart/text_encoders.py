"""The text side of a base model: tokenizers and encoders of Stable Diffusion 3, very small.

Promises
- Every piece of a vocabulary is one token, the same token wherever it stands. Of the text quickstart's the
  template and each character are pieces: `K` is the same number in "KKKK" and in "7K", a word is therefore
  exactly four tokens.
- Encoders are frozen and made from a seed, not trained; their outputs have about unit variance, which is
  what the transformer expects. One layer each: the pipeline takes the hidden states before the last layer,
  so what the transformer sees of a character is its own embedding plus that of its place.
- The T5 encoder is there because plain `from_pretrained` asks for one; it adds a single constant token when
  the pipeline is called with `max_sequence_length=1`.
"""

from dataclasses import dataclass
from typing import Final

import torch
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing
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
    """A frozen encoder of one layer: random, but for orthogonal embeddings and heads that point.

    Tokens and places are orthogonal to each other and have half the variance each. Each head looks at one of
    the watched places alone, so that the pooled output depends on what stands where, and not only on the sum.
    """
    width, places = vocabulary.width, vocabulary.prompt_tokens
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=1,
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
    attention = encoder.text_model.encoder.layers[0].self_attn
    attention.q_proj.weight.zero_()
    attention.k_proj.weight.zero_()
    for head, place in enumerate(vocabulary.watched):
        row = head * (width // len(vocabulary.watched))
        attention.q_proj.bias[row] = POINTING
        attention.k_proj.weight[row] = axes[place]
    return encoder


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
