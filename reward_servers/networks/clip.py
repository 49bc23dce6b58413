"""CLIP networks as rewards: features of images and prompts, and scorers that compare the two.

Promises
- One image with one prompt each: the matrix of every image with every prompt is never computed, and a prompt
  that occurs more than once in a call is encoded once.
- Features are normalised, and the formula computed, in float32 whatever the network's dtype; the temperature
  is never rounded to it (in bfloat16 100 would become 98.9).
- A tokenizer whose vocabulary is not the network's is refused: its features would be those of other words.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import CLIPModel, CLIPTextConfig, CLIPTokenizer

from reward_servers.networks.loading import (
    NeuralOptions,
    NeuralScorer,
    batches,
    frozen,
    load_network,
    require_place,
    weights_name,
)
from reward_servers.scorer import ItemScore
from reward_servers.wire import Images, ScoreCall

Preprocess = Callable[[Images, int], Tensor]
"""RGB images and the side of the network's input -> (N, 3, side, side) float32."""

_LEGACY_EOS: Final = 2
"""`eos_token_id` of configurations from before transformers 4.31: the prompt ends at its highest token."""


class ClipOptions(NeuralOptions):
    """Arguments of every scorer that is a CLIP network."""

    path: str
    """Local directory or hub id of the network, in the format of transformers' CLIPModel."""
    scale: float = Field(default=1.0, gt=0)
    """The score is divided by this."""


class Clip:
    """A CLIP network, frozen."""

    def __init__(self, network: CLIPModel, options: NeuralOptions) -> None:
        """`network` in float32; it is cast and moved as the options say."""
        self.temperature = math.exp(network.logit_scale.item())
        """The factor of a cosine in CLIP's logits, about 100."""
        self._network = frozen(network, options)
        self._options = options
        self.side: int = network.config.vision_config.image_size
        """Height and width of the network's input, pixels."""

    @classmethod
    def load(cls, source: str, options: NeuralOptions) -> Clip:
        """The network in a local directory or at a hub id, in the format of transformers' CLIPModel.

        Raises:
            ValueError: it cannot be loaded, or is no whole CLIP network.
        """
        # Loaded in float32 and cast later: the temperature must not be rounded.
        exact = options.model_copy(update={"dtype": "float32", "device": "cpu"})
        return cls(load_network(CLIPModel, source, exact), options)

    @property
    def text_config(self) -> CLIPTextConfig:
        return self._network.config.text_config

    @property
    def activations(self) -> set[str]:
        """Names of the activation functions; of OpenAI's networks `quick_gelu`."""
        config = self._network.config
        return {config.text_config.hidden_act, config.vision_config.hidden_act}

    @property
    def width(self) -> int:
        """Length of a feature."""
        found: int = self._network.config.projection_dim
        return found

    @torch.inference_mode()
    def image_features(self, images: Images, preprocess: Preprocess) -> Tensor:
        """(N, width) float32 on the CPU, projected, each of length 1."""
        parts = []
        for part in batches(images, self._options.max_batch):
            pixels = preprocess(part, self.side).to(self._options.device, self._options.torch_dtype)
            parts.append(_unit(self._network.get_image_features(pixel_values=pixels).pooler_output))
        return torch.cat(parts)

    @torch.inference_mode()
    def text_features(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """(N, width) float32 on the CPU, projected, each of length 1.

        Args:
            tokens: of each prompt, from the start to the end token, without padding.
        """
        parts = []
        for part in batches(tokens, self._options.max_batch):
            # Attention is causal: what comes after the end token, where the feature is taken, is never seen.
            longest = max(len(one) for one in part)
            padded = torch.tensor([[*one, *[one[-1]] * (longest - len(one))] for one in part])
            padded = padded.to(self._options.device)
            parts.append(_unit(self._network.get_text_features(input_ids=padded).pooler_output))
        return torch.cat(parts)


class ClipTokens:
    """CLIP's byte-pair encoding, cut to what the network takes."""

    def __init__(self, source: str, config: CLIPTextConfig, revision: str | None = None) -> None:
        """The tokenizer in a local directory or at a hub id.

        Raises:
            ValueError: there is none, or it is not that of the network.
        """
        try:
            require_place(source)
            self._tokenizer = CLIPTokenizer.from_pretrained(source, revision=revision)
        except Exception as error:
            raise ValueError(f"{source}: no CLIP tokenizer could be loaded from there: {error}") from error
        self._longest: int = config.max_position_embeddings
        end = config.vocab_size - 1 if config.eos_token_id == _LEGACY_EOS else config.eos_token_id
        # transformers makes an empty tokenizer of a directory that holds none.
        if len(self._tokenizer) != config.vocab_size or self._tokenizer.eos_token_id != end:
            raise ValueError(
                f"{source}: a tokenizer of {len(self._tokenizer)} tokens that ends prompts with token "
                f"{self._tokenizer.eos_token_id}; the network knows {config.vocab_size} and expects {end}"
            )

    def encode(self, prompts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Tokens of each prompt with the start and end token; whether its end did not fit (77 in CLIP)."""
        found = self._tokenizer(list(prompts), truncation=True, max_length=self._longest)
        return found["input_ids"], [bool(encoding.overflowing) for encoding in found.encodings]


class ClipPairScorer(NeuralScorer):
    """A score that is a factor of the cosine between image and prompt.

    Details: `cosine`, and `truncated`, 1 where the network has not seen the end of a prompt.
    """

    def __init__(self, clip: Clip, tokens: ClipTokens, options: ClipOptions, *, factor: float) -> None:
        super().__init__(options, weights_name(options.path, options.revision))
        self._clip = clip
        self._tokens = tokens
        self._factor = factor

    @abstractmethod
    def pixels(self, images: Images, side: int) -> Tensor:
        """(N, 3, side, side) float32, preprocessed as published."""

    def caption(self, prompt: str) -> str:
        """What of a prompt is tokenized."""
        return prompt

    def score(self, call: ScoreCall) -> Sequence[ItemScore]:
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(call.prompts))}
        tokens, truncated = self._tokens.encode([self.caption(prompt) for prompt in places])
        chosen = [places[prompt] for prompt in call.prompts]
        texts = self._clip.text_features(tokens)[chosen]
        images = self._clip.image_features(call.images, self.pixels)
        cosines: list[float] = (images * texts).sum(dim=1).tolist()
        return [
            self.item(cosine * self._factor, {"cosine": cosine, "truncated": int(truncated[place])})
            for cosine, place in zip(cosines, chosen, strict=True)
        ]

    def warm_up(self) -> None:
        images = [np.zeros((self._clip.side, self._clip.side, 3), np.uint8)] * self.max_batch
        self.score(ScoreCall(images, ["a photo"] * self.max_batch, [{}] * self.max_batch))


def _unit(features: Tensor) -> Tensor:
    exact = features.to("cpu", torch.float32)
    unit: Tensor = exact / torch.linalg.vector_norm(exact, dim=1, keepdim=True)
    return unit
