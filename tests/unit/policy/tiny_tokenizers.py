"""Tokenizers of the real classes, made here: letters are tokens, and what a pipeline puts around prompts."""

from __future__ import annotations

import inspect

from diffusers import SanaPipeline
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import CLIPTokenizer, GemmaTokenizer, Qwen2Tokenizer, T5Tokenizer

CLIP_LENGTH = 12
LETTERS = [chr(code) for code in range(33, 127)]

QWEN_TEMPLATE = (
    *(
        "<|im_start|>",
        "system",
        "\n",
        "Describe",
        " the",
        " image",
        " by",
        " detailing",
        " the",
        " color",
        ",",
    ),
    *(" shape", ",", " size", ",", " texture", ",", " quantity", ",", " text", ",", " spatial"),
    *(" relationships", " of", " the", " objects", " and", " background", ":", "<|im_end|>", "\n"),
    *("<|im_start|>", "user", "\n"),
)
"""The 34 tokens before a prompt that the pipeline counts off."""


def clip_tokenizer() -> CLIPTokenizer:
    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*pieces, *((letter, -3.0) for letter in LETTERS)], extra_ids=0)


def qwen_tokenizer() -> Qwen2Tokenizer:
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    pieces = dict.fromkeys((*QWEN_TEMPLATE, "assistant"))
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in pieces])
    return tokenizer


def gemma_tokenizer() -> GemmaTokenizer:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    vocabulary = {piece: number for number, piece in enumerate([*special, *LETTERS])}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    # Each line of the instruction is one token, or a prompt would take a thousand.
    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    tokenizer.add_tokens([AddedToken(line, normalized=False, special=False) for line in lines])
    return tokenizer
