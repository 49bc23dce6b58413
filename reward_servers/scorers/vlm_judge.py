"""A vision-language model as judge, through an OpenAI-compatible chat endpoint (vLLM, SGLang).

    {"preset": "unified_reward", "base_url": "http://judge:17140/v1", "api_key_env": "JUDGE_KEY"}

One chat request an image: the image as PNG and the template with its prompt, temperature 0. The score is the
group of `score_pattern` in the answer (vlm/reading.py), divided by `divide_by`.

Promises
- An image whose answer holds no score is an error that shows the answer; nothing becomes 0.
- At most `concurrency` requests are at the endpoint at once, over all images of a call; what may pass is
  tried again (vlm/endpoint.py).
- A call ends within `call_s`. If the endpoint was unavailable for an image, or had not answered by then, the
  call as a whole fails with 503, which clients try again: what may pass is no error of an image.

Not batch-invariant: each image is a request of its own, but the endpoint batches it with whatever else it
serves, and its kernels give other bits for other batches. At temperature 0 that can still change a word.

`call_s` must be less than the server's `deadline_s`. With `batching: dynamic` requests share `concurrency`;
with `request` they queue behind one another.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import httpx
from pydantic import Field, field_validator, model_validator

from reward_servers.protocol import Metadata, ProtocolError
from reward_servers.scorer import ItemScore, Scorer, ScorerOptions
from reward_servers.vlm.endpoint import ChatEndpoint, Refused, Unavailable
from reward_servers.vlm.question import PRESETS, PROMPT_MARK, image_url, question
from reward_servers.vlm.reading import NoScore, read_answer, read_score
from reward_servers.wire import ScoreCall

_OURS = ("model", "messages", "temperature", "max_tokens", "stream", "n")
_KEPT_CHARS = 4000


class VlmJudgeOptions(ScorerOptions):
    """Arguments of the `vlm_judge` scorer. A preset fills in what is not given."""

    neutral: ClassVar[frozenset[str]] = frozenset(
        {"preset", "base_url", "api_key_env", "concurrency", "attempt_s", "retries", "call_s"}
    )

    preset: Literal["unified_reward", "unified_reward_qwen"] | None = None
    """Model, template, pattern, range, divisor and image size of a published judge (vlm/question.py)."""
    base_url: str
    """Address of the endpoint, up to and with /v1."""
    model: str = Field(min_length=1)
    """Name under which the endpoint serves the judge."""
    api_key_env: str | None = None
    """Environment variable of this server that holds the endpoint's key; null sends none."""
    prompt_template: str
    """What the judge is asked, with {prompt} where the prompt goes."""
    score_pattern: re.Pattern[str]
    """Regular expression with one group, the number; vlm/reading.py says what else must hold."""
    score_range: tuple[float, float] | None = None
    """Least and greatest number of the judge's scale, before the division; null takes any finite one."""
    divide_by: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """What the judge's number is divided by."""
    image_size: int | None = Field(default=512, ge=1, le=4096)
    """Side of the square that images are resized to; null sends them as they are."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Of the judge's sampling; above 0 a score is random."""
    max_tokens: int = Field(default=512, ge=1)
    """Length of an answer, tokens."""
    request: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the chat request, such as seed or chat_template_kwargs."""
    concurrency: int = Field(default=16, ge=1)
    """Requests at the endpoint at once."""
    attempt_s: float = Field(default=25.0, gt=0)
    """Seconds for one attempt."""
    retries: int = Field(default=3, ge=0)
    """Attempts after the first."""
    call_s: float = Field(default=50.0, gt=0)
    """Seconds for all images of one call, and for the endpoint to answer at warm-up."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        preset = given.get("preset") if isinstance(given, dict) else None
        # An unknown one is left to the field's own check.
        return {**PRESETS[preset], **given} if isinstance(preset, str) and preset in PRESETS else given

    @field_validator("base_url")
    @classmethod
    def _address(cls, given: str) -> str:
        try:
            url = httpx.URL(given)
        except httpx.InvalidURL as error:
            raise ValueError(f"{given!r}: {error}") from error
        if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
            raise ValueError(f"{given!r} is no http:// or https:// address such as http://judge:8000/v1")
        if url.userinfo:
            raise ValueError("holds a password; name the environment variable of a key in api_key_env")
        return given

    @field_validator("prompt_template")
    @classmethod
    def _has_mark(cls, given: str) -> str:
        if PROMPT_MARK not in given:
            raise ValueError(f"has no {PROMPT_MARK}: the judge would not know what was asked for")
        return given

    @field_validator("score_pattern")
    @classmethod
    def _one_group(cls, given: re.Pattern[str]) -> re.Pattern[str]:
        if given.groups != 1:
            raise ValueError(f"has {given.groups} groups; one, the number, is needed: use (?:...) for others")
        return given

    @field_validator("score_range")
    @classmethod
    def _ordered(cls, given: tuple[float, float] | None) -> tuple[float, float] | None:
        if given is not None and not given[0] < given[1]:
            raise ValueError(f"{given[0]:g} is not less than {given[1]:g}")
        return given

    @field_validator("request")
    @classmethod
    def _not_ours(cls, given: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(set(given) & set(_OURS)):
            raise ValueError(f"{', '.join(taken)}: set by this scorer or by an argument of its own")
        return given

    def key(self) -> str | None:
        """The endpoint's key, from the environment."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "")
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"api_key_env: environment variable {self.api_key_env} holds no usable key")
        return key


def create(args: dict[str, Any], threads: int) -> VlmJudge:
    return VlmJudge(VlmJudgeOptions.model_validate(args))


class VlmJudge(Scorer):
    name = "vlm_judge"
    version = "1"
    batch_invariant = False
    max_batch = 256

    def __init__(self, options: VlmJudgeOptions) -> None:
        self.options = self._options = options
        self._key = options.key()
        self.model = options.model

    def check(self, prompt: str, metadata: Metadata) -> str | None:
        if self._options.score_pattern.search(prompt) is None:
            return None
        # A judge that repeats its caption would give the score that stands in it.
        return f"prompt {prompt!r:.120} holds what a score is recognised by"

    def warm_up(self) -> None:
        """Ask whether the endpoint serves the model. Its own warm-up is its own affair.

        Raises:
            RuntimeError: it does not, or not within `call_s`.
        """
        served = asyncio.run(self._models())
        if self._options.model not in served:
            raise RuntimeError(
                f"scorer 'vlm_judge': {self._options.base_url} does not serve {self._options.model!r}; "
                f"it serves {', '.join(served) or 'nothing'}"
            )

    def score(self, call: ScoreCall) -> Sequence[ItemScore]:
        return asyncio.run(self._judge(call))

    async def _models(self) -> list[str]:
        place = f"scorer 'vlm_judge': no list of models from {self._options.base_url}"
        try:
            async with asyncio.timeout(self._options.call_s), self._endpoint() as endpoint:
                return await endpoint.models()
        except TimeoutError as error:
            raise RuntimeError(f"{place} within {self._options.call_s:g} s") from error
        except (Unavailable, Refused) as error:
            raise RuntimeError(f"{place}: {error}") from error

    async def _judge(self, call: ScoreCall) -> list[ItemScore]:
        until = asyncio.get_running_loop().time() + self._options.call_s
        async with self._endpoint() as endpoint:

            async def one(index: int) -> ItemScore | Unavailable:
                try:
                    async with asyncio.timeout_at(until):
                        return await self._judge_one(endpoint, call, index)
                except (NoScore, Refused) as error:
                    return ItemScore(None, error=str(error))
                except Unavailable as error:
                    return error
                except TimeoutError:
                    return Unavailable(f"no answer within the call's {self._options.call_s:g} s")

            items = await asyncio.gather(*map(one, range(len(call))))
        scored = [item for item in items if isinstance(item, ItemScore)]
        failed = [item for item in items if isinstance(item, Unavailable)]
        if failed:
            raise ProtocolError(
                503,
                f"the judge at {self._options.base_url} is unavailable for {len(failed)} of {len(items)} "
                f"images: {failed[0]}",
                retry_after_s=2,
            )
        return scored

    async def _judge_one(self, endpoint: ChatEndpoint, call: ScoreCall, index: int) -> ItemScore:
        options = self._options
        url = await asyncio.to_thread(image_url, call.images[index], options.image_size)
        text = question(options.prompt_template, call.prompts[index])
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        answer = await endpoint.chat(
            {
                **options.request,
                "model": options.model,
                "messages": [{"role": "user", "content": content}],
                "temperature": options.temperature,
                "max_tokens": options.max_tokens,
            }
        )
        said = read_answer(answer)
        number = read_score(said, options.score_pattern, options.score_range)
        return ItemScore(number / options.divide_by, {"text": said[-_KEPT_CHARS:], "raw": number})

    def _endpoint(self) -> ChatEndpoint:
        options = self._options
        return ChatEndpoint(
            options.base_url,
            self._key,
            attempt_s=options.attempt_s,
            retries=options.retries,
            concurrency=options.concurrency,
            patience_s=options.call_s,
        )
