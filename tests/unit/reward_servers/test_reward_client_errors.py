"""What the client says and shows: bounded, without secrets, and of addresses that can be called."""

from __future__ import annotations

import json
import pickle
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from reward_servers.client import (
    RewardError,
    RewardInvalid,
    RewardRefused,
    RewardUnavailable,
)
from reward_servers.exchange import Answer
from tests.unit.reward_servers.scripted_server import TOKEN, Reply, changed, client_of

Images = NDArray[np.uint8]


def test_the_token_is_sent_and_never_shown(scripted: Any, images: Images) -> None:
    url, script = scripted(Reply(401, b""))
    client = client_of(url)
    with pytest.raises(RewardRefused) as caught:
        client.score(images, "p")
    assert script.requests[0]["headers"][b"authorization"] == b"Bearer a-token-for-tests-only"
    assert "a-token-for-tests-only" not in str(caught.value) + repr(client)


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RewardRefused("words", "http://x", "422 no")))  # noqa: S301
    assert isinstance(error, RewardRefused)
    assert (str(error), error.name) == ("reward 'words' at http://x: 422 no", "words")


def test_every_error_is_a_reward_error() -> None:
    assert all(issubclass(kind, RewardError) for kind in (RewardUnavailable, RewardRefused, RewardInvalid))


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="no http"):
        client_of(url)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=f"you sent Bearer {TOKEN}".encode()),
        Reply(422, json.dumps({"error": "refused", "detail": f"Bearer {TOKEN}"}).encode()),
        Reply(500, f"Authorization: Bearer {TOKEN}".encode()),
        Reply(302, b"", {"location": f"http://elsewhere/?token={TOKEN}"}),
        changed(scores=[None, *[0.5] * 4], errors=[{"index": 0, "error": TOKEN}]),
        changed(reward=TOKEN),
    ],
)
def test_a_token_that_the_server_repeats_is_not_shown(
    scripted: Any, images: Images, ask: Any, reply: Reply
) -> None:
    url, _ = scripted(reply)
    with pytest.raises(RewardError, match=r"\*\*\*") as caught:
        ask(client_of(url, 0.3, app="fake"), images)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(422, json.dumps({"error": "refused", "detail": "d" * 10**6}).encode()),
        Reply(500, json.dumps({"error": "failed", "detail": "d" * 10**6}).encode()),
        changed(**{"k" * 10**6: 1}),
        changed(scores=[None, *[0.5] * 4], errors=[{"index": 0, "error": "e" * 10**6}]),
        changed(reward="r" * 10**6),
    ],
)
def test_what_came_is_shortened(scripted: Any, images: Images, ask: Any, reply: Reply) -> None:
    url, _ = scripted(reply)
    with pytest.raises(RewardError) as caught:
        ask(client_of(url, 0.3, app="fake"), images)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("nan", 0.0),
        ("-3", 0.0),
        ("inf", float("inf")),
        ("soon", 0.0),
        ("Mon, 01 Jan 0001 00:00:00 GMT", 0.0),
        ("Mon, 01 Jan 2024 00:00:00 +9999999999999999999", 0.0),
    ],
)
def test_any_retry_after_is_a_number_of_seconds(header: str, seconds: float) -> None:
    assert Answer(httpx.Response(429, headers={"retry-after": header})).retry_after_s == seconds


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://[::1", "Invalid port"),
        ("http://h:port", "Invalid port"),
        ("http://h\x00", "non-printable"),
        ("http://h/?token=s3cret", "up to /v1"),
        ("http://user:s3cret@h", "holds a password"),
    ],
)
def test_an_address_that_cannot_be_called_is_refused(url: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        client_of(url)
    assert "user:s3cret" not in str(caught.value)


def test_what_a_server_says_of_itself_is_bounded(scripted: Any) -> None:
    for reply in (Reply(body=bytes(17 * 1024 * 1024)), Reply(hang=True), Reply(302), Reply(body=b"{")):
        url, _ = scripted(reply)
        client = client_of(url)
        assert client.info(0.5) is None
        client.close()
