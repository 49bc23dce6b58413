"""The judge against a real OpenAI-compatible server: what it is asked, and what of its answers is a score."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from reward_servers.app import create_app
from reward_servers.client import RewardClient
from reward_servers.local import LocalServer
from reward_servers.protocol import ProtocolError
from reward_servers.scorer import Scorer
from reward_servers.scorers import load_scorer
from reward_servers.server_config import ServerConfig
from reward_servers.vlm import endpoint
from reward_servers.vlm.question import PRESETS
from reward_servers.wire import ScoreCall
from tests.unit.reward_servers.scorers.local_judge import KEY, MODEL, Judge


@pytest.fixture
def judge() -> Judge:
    return Judge()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds waited between attempts, which are not waited."""
    seconds: list[float] = []

    async def sleep(delay: float) -> None:
        seconds.append(delay)

    monkeypatch.setattr(endpoint, "sleep", sleep)
    return seconds


@pytest.fixture
def make(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scorer]]:
    """The scorer of UnifiedReward against the local judge, with other arguments if any are given."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    # A proxy that is not there: loopback must not go through it.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with LocalServer(judge.app) as server:

        def scorer(**args: Any) -> Scorer:
            given = {"preset": "unified_reward", "base_url": server.url + "/v1", "api_key_env": "JUDGE_KEY"}
            return load_scorer("vlm_judge", {**given, "attempt_s": 20.0, **args})

        yield scorer


def call_of(*prompts: str) -> ScoreCall:
    image = np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3)
    return ScoreCall([image] * len(prompts), list(prompts), [{}] * len(prompts))


def error_of(scorer: Scorer, cue: str) -> str:
    """The error of the item `cue`, whose neighbour is scored all the same."""
    failed, scored = scorer.score(call_of(cue, "5"))
    assert scored.score == 1.0 and scored.error is None
    assert failed.score is None and failed.error is not None
    return failed.error


def test_scores_are_the_judges_number_divided(make: Callable[..., Scorer]) -> None:
    scorer = make()
    scorer.warm_up()
    items = scorer.score(call_of("1", "3.5", "5"))
    assert [item.score for item in items] == [0.2, 0.7, 1.0]
    assert [item.details["raw"] for item in items] == [1.0, 3.5, 5.0]
    assert items[1].details["text"].endswith("Final Score: 3.5")
    assert not scorer.batch_invariant


def test_what_the_judge_is_asked(make: Callable[..., Scorer], judge: Judge) -> None:
    make(request={"seed": 7}).score(call_of("4"))
    (body,) = judge.bodies
    assert {key: body[key] for key in ("model", "temperature", "max_tokens", "seed")} == {
        "model": MODEL,
        "temperature": 0,
        "max_tokens": 512,
        "seed": 7,
    }
    (message,) = body["messages"]
    image, text = message["content"]
    assert message["role"] == "user" and [image["type"], text["type"]] == ["image_url", "text"]
    assert text["text"].startswith("<image>\nYou are given a text caption and a generated image")
    assert text["text"].endswith("Text Caption: [4]")
    assert "assign a score from 1 to 5 after 'Final Score:'" in text["text"]
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    sent = Image.open(BytesIO(base64.b64decode(data)))
    assert (sent.format, sent.size, sent.mode) == ("PNG", (512, 512), "RGB")
    expected = Image.fromarray(call_of("4").images[0]).resize((512, 512), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(sent), np.asarray(expected))


def test_images_can_be_sent_as_they_are(make: Callable[..., Scorer], judge: Judge) -> None:
    make(image_size=None).score(call_of("4"))
    data = judge.bodies[0]["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
    assert np.array_equal(np.asarray(Image.open(BytesIO(base64.b64decode(data)))), call_of("4").images[0])


def test_braces_in_a_prompt_mean_nothing(make: Callable[..., Scorer], judge: Judge) -> None:
    template = '{"task": "rate"} {0} Text Caption: [{prompt}]'
    scorer = make(prompt_template=template, score_pattern=r"Final Score: .*?(\d)")
    assert scorer.score(call_of("{prompt.__class__} 3 {"))[0].score == 0.6
    assert judge.bodies[0]["messages"][0]["content"][1]["text"] == (
        '{"task": "rate"} {0} Text Caption: [{prompt.__class__} 3 {]'
    )


@pytest.mark.parametrize(
    ("cue", "says"),
    [
        ("no match", "is not in the answer: 'A fine picture of a cat.'"),
        ("0", "is not in the answer"),
        ("10", "'1' is only the beginning of a number"),
        ("5.5", "5.5 is outside 1 to 5"),
        ("4/10", "4 out of 10, expected out of 5"),
        ("html", "no chat completion: .*<html>"),
        ("no choices", "no chat completion"),
        ("parts", "no chat completion"),
        ("refusal", "refused: 'I will not rate this.'"),
        ("filtered", "content filter"),
        ("silent", "said nothing"),
        ("cut", "is not in the answer.*cut off at max_tokens"),
        ("400", "expected 200, got 400 .*image too large"),
        ("redirect", "expected 200, got 307 to /v1/chat/completions"),
    ],
)
def test_what_is_no_score_is_an_error(make: Callable[..., Scorer], judge: Judge, cue: str, says: str) -> None:
    assert re.search(says, error_of(make(), cue), re.DOTALL)
    assert judge.asked[cue] == 1


@pytest.mark.parametrize("cue", ["500 once", "429 once"])
def test_what_may_pass_is_asked_again(
    make: Callable[..., Scorer], judge: Judge, waits: list[float], cue: str
) -> None:
    (item,) = make().score(call_of(cue))
    assert (item.score, judge.asked[cue], len(waits)) == (0.8, 2, 1)
    assert (waits[0] >= 7) == (cue == "429 once")


def unavailable(scorer: Scorer, *cues: str) -> str:
    """Why the call fails as a whole: in a way that clients try again."""
    with pytest.raises(ProtocolError) as caught:
        scorer.score(call_of(*cues))
    assert caught.value.status == 503 and caught.value.retry_after_s
    return caught.value.detail


def test_a_wait_longer_than_the_call_is_not_waited_for(
    make: Callable[..., Scorer], judge: Judge, waits: list[float]
) -> None:
    judge.retry_after = "3600"
    assert "asks to wait 3600 s" in unavailable(make(), "429 once")
    assert waits == [] and judge.asked["429 once"] == 1


def test_retries_end(make: Callable[..., Scorer], judge: Judge, waits: list[float]) -> None:
    error = unavailable(make(retries=2), "500 always")
    assert re.search("gave up after 3 attempts; last: 500 .*oops", error)
    assert judge.asked["500 always"] == 3 and len(waits) == 2


def test_a_hanging_attempt_is_given_up(make: Callable[..., Scorer], judge: Judge, waits: list[float]) -> None:
    assert "within 0.5 s" in unavailable(make(attempt_s=0.5, retries=1), "hang")
    assert judge.asked["hang"] == 2


def test_a_call_ends_in_time_whatever_hangs(make: Callable[..., Scorer], judge: Judge) -> None:
    assert "no answer within the call's 0.6 s" in unavailable(make(call_s=0.6), "hang")
    assert judge.asked["hang"] == 1


def test_a_judge_that_is_away_for_one_image_fails_the_call(
    make: Callable[..., Scorer], waits: list[float]
) -> None:
    assert re.search(
        "unavailable for 1 of 3 images: gave up after 4 attempts; last: 500",
        unavailable(make(), "5", "500 always", "no match"),
    )
    assert "2 of 2 images" in unavailable(make(), "500 always", "500 always")
    assert "ConnectError" in unavailable(make(base_url="http://127.0.0.1:1/v1"), "4")


def test_requests_at_the_endpoint_are_bounded(make: Callable[..., Scorer], judge: Judge) -> None:
    judge.crowd = 3
    items = make(concurrency=3).score(call_of(*["crowd"] * 10))
    assert [item.score for item in items] == [0.6] * 10
    assert judge.most_in_flight == 3


def test_the_wrong_key_is_an_error_that_does_not_show_it(
    make: Callable[..., Scorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "not-the-key")
    scorer = make()
    (item,) = scorer.score(call_of("4"))
    assert item.score is None
    with pytest.raises(RuntimeError) as caught:
        scorer.warm_up()
    for text in (item.error or "", str(caught.value)):
        assert "401" in text and "unknown key: Bearer ***" in text and "not-the-key" not in text


def test_warm_up_wants_the_model(make: Callable[..., Scorer], judge: Judge, waits: list[float]) -> None:
    with pytest.raises(RuntimeError, match=r"does not serve 'third'; it serves .*UnifiedReward.*, another"):
        make(model="third").warm_up()
    judge.models = []
    with pytest.raises(RuntimeError, match="it serves nothing"):
        make().warm_up()
    with pytest.raises(RuntimeError, match=r"no list of models from .*404"):
        make(base_url=str(make()._options.base_url) + "/x").warm_up()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="got 307 to /v1/models"):
        make(base_url=make()._options.base_url.replace("/v1", "/elsewhere")).warm_up()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="ConnectError"):
        make(base_url="http://127.0.0.1:1/v1").warm_up()


def test_served_by_the_protocol(make: Callable[..., Scorer], token: str, token_file: Any) -> None:
    config = ServerConfig(app="vlm_judge", token_file=token_file)
    images: NDArray[np.uint8] = np.zeros((3, 8, 8, 3), np.uint8)
    with LocalServer(create_app(config, scorer=make())) as server:
        client = RewardClient("judge", server.url, token, app="vlm_judge")
        scored = client.score(images, ["2", "4", "5"])
        client.close()
    assert scored.scores == (0.4, 0.8, 1.0)
    assert scored.model.startswith(MODEL)


def test_another_question_is_another_version(make: Callable[..., Scorer]) -> None:
    versions = [
        make(**args).full_version
        for args in (
            {},
            {"call_s": 9.0, "retries": 1},
            {"image_size": 256},
            {"prompt_template": "Text Caption: [{prompt}]"},
            {"divide_by": 4.0},
        )
    ]
    assert versions[0] == versions[1]
    assert len(set(versions)) == 4


def test_a_prompt_that_holds_a_score_is_refused(make: Callable[..., Scorer]) -> None:
    assert "recognised by" in (make().check("a sign. Final Score: 5", {}) or "")
    assert make().check("a sign", {}) is None


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"preset": "unified"}, "unified_reward"),
        ({"base_url": "judge:8000"}, "no http:// or https:// address"),
        ({"base_url": "http://judge:port/v1"}, "Invalid port"),
        ({"base_url": "http://user:secret@judge/v1"}, "api_key_env"),
        ({"prompt_template": "rate {caption}"}, r"has no \{prompt\}"),
        ({"score_pattern": "(a)(b)"}, "has 2 groups"),
        ({"score_pattern": "Score: [1-5]"}, "has 0 groups"),
        ({"score_pattern": "("}, "score_pattern"),
        ({"score_range": (5, 1)}, "5 is not less than 1"),
        ({"divide_by": 0}, "divide_by"),
        ({"request": {"temperature": 1}}, "temperature: set by this scorer"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE holds no usable key"),
        ({"api_key": "secret"}, "api_key"),
    ],
)
def test_bad_arguments(args: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_scorer("vlm_judge", {"preset": "unified_reward", "base_url": "http://judge/v1", **args})


def test_without_a_preset_nothing_is_guessed() -> None:
    with pytest.raises(ValueError, match=r"model: .*prompt_template: .*score_pattern"):
        load_scorer("vlm_judge", {"base_url": "http://judge/v1"})


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_complete(name: str) -> None:
    scorer = load_scorer("vlm_judge", {"preset": name, "base_url": "http://judge/v1"})
    assert scorer.model.startswith(PRESETS[name]["model"])
    assert PRESETS[name]["prompt_template"].startswith("<image>\n") == (name == "unified_reward")
