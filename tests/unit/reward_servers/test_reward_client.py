"""The client against servers that misbehave on cue: every failure is an error that names the server."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from reward_servers.client import (
    RewardClient,
    RewardInvalid,
    RewardRefused,
    RewardUnavailable,
)
from reward_servers.exchange import MAX_ANSWER_BYTES
from tests.unit.reward_servers.scripted_server import GOOD, Reply, changed, client_of

Images = NDArray[np.uint8]
SHED_BY_SERVE = b"Request dropped due to backpressure (num_queued_requests=1, max_queued_requests=1)."
"""Where Serve's proxy was not started as proxy.py says."""


def test_scores_from_a_real_server(serve_fake: Any, images: Images, ask: Any) -> None:
    scored = ask(client_of(serve_fake(), app="fake"), images)
    assert scored.scores == tuple(image.mean() for image in images)
    assert (scored.model, scored.version, scored.attempts) == ("mean of the pixels", "7", 1)
    assert scored.details[0] == {"prompt": "p"}


@pytest.mark.parametrize(
    "bad",
    [
        Reply(500, b'{"error": "scorer_failed", "detail": "boom"}'),
        Reply(503, b"<html>no upstream</html>", kind="text/html"),
        Reply(429, b'{"error": "overloaded", "detail": "later"}', {"retry-after": "0"}),
        Reply(504, b""),
        Reply(429, SHED_BY_SERVE, {"retry-after": "0"}, kind="text/plain"),
        Reply(503, b"Deployment is unavailable.", kind="text/plain"),
    ],
)
def test_what_passes_is_tried_again(scripted: Any, images: Images, ask: Any, bad: Reply) -> None:
    url, script = scripted(bad, bad, Reply())
    scored = ask(client_of(url), images)
    assert (scored.scores, scored.attempts, len(script.requests)) == ((0.5,) * 5, 3, 3)


@pytest.mark.parametrize("asked", [{}, {"retry-after": "0.1"}])
def test_a_pause_that_would_overrun_the_deadline_is_cut_short(
    scripted: Any, images: Images, ask: Any, monkeypatch: pytest.MonkeyPatch, asked: dict[str, str]
) -> None:
    drawn = SimpleNamespace(uniform=lambda low, high: low + 0.05 * (high - low))
    monkeypatch.setattr("reward_servers.retrying.random", drawn)
    monkeypatch.setattr("reward_servers.client._BACKOFF_S", (1000.0, 1000.0))
    url, script = scripted(Reply(503, headers=asked), Reply())
    scored = ask(client_of(url, 8.0), images)
    assert (scored.attempts, len(script.requests)) == (2, 2)


def test_a_server_that_asks_for_more_time_than_there_is_is_not_asked_again(
    scripted: Any, images: Images, ask: Any
) -> None:
    url, script = scripted(Reply(429, headers={"retry-after": "4"}), Reply())
    with pytest.raises(RewardUnavailable, match="gave up after 1 attempts"):
        ask(client_of(url, 4.0), images)
    assert len(script.requests) == 1


def test_a_server_that_has_scored_may_lose_its_paths_for_a_while(
    scripted: Any, images: Images, ask: Any
) -> None:
    """As Serve's proxy does that comes up again."""
    gone = Reply(404, b'{"error": "not_found", "detail": "no such path"}')
    url, _ = scripted(Reply(), gone, gone, Reply(), gone)
    client = client_of(url, deadline_s=3.0)
    client.score(images, "p")
    assert client.score(images, "p").attempts == 3
    with pytest.raises(RewardUnavailable, match="it has scored before"):
        client.score(images, "p")
    client.close()


def test_a_hang_is_asked_again_within_the_deadline(scripted: Any, images: Images, ask: Any) -> None:
    url, _ = scripted(Reply(hang=True), Reply())
    assert ask(client_of(url, attempt_s=0.2), images).attempts == 2


def test_an_attempt_at_the_end_of_the_deadline_can_still_be_answered(
    scripted: Any, images: Images, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As long as a whole attempt: how fast this machine answers says nothing here.
    monkeypatch.setattr("reward_servers.client._SHORTEST_ATTEMPT_S", 20.0)
    begins = iter([0.0])
    clock = SimpleNamespace(monotonic=lambda: next(begins, 1.0))
    monkeypatch.setattr("reward_servers.client.time", clock)
    url, _ = scripted(Reply())
    assert ask(client_of(url, deadline_s=1.0, attempt_s=20.0), images).attempts == 1


def test_a_closed_connection_is_opened_again(scripted: Any, images: Images, ask: Any) -> None:
    url, _ = scripted(Reply(headers={"connection": "close"}))
    assert ask(client_of(url), images).attempts == 1


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (Reply(500, b'{"error": "scorer_failed", "detail": "boom"}'), "500 scorer_failed: boom"),
        (Reply(429, b"", {"retry-after": "3600"}), "429"),
        (Reply(503, b"<html>down</html>", kind="text/html"), "<html>down</html>"),
        (Reply(hang=True), "no answer within"),
    ],
)
def test_after_the_deadline_it_is_unavailable(
    scripted: Any, images: Images, ask: Any, reply: Reply, says: str
) -> None:
    url, _ = scripted(reply)
    with pytest.raises(RewardUnavailable) as caught:
        ask(client_of(url, 1.0), images)
    assert "'words'" in str(caught.value) and url in str(caught.value)
    assert says in str(caught.value)
    assert caught.value.__cause__ is not None


def test_what_was_spent_of_the_deadline_before_is_not_waited_again(scripted: Any, images: Images) -> None:
    url, _ = scripted(Reply(hang=True))
    began = time.monotonic()
    with pytest.raises(RewardUnavailable, match="no scores within 30 s"):
        client_of(url, 30.0).score(images, "a word", spent_s=29.7)
    assert time.monotonic() - began < 10


def test_what_serve_sheds_in_plain_text_is_the_same_error(scripted: Any, images: Images, ask: Any) -> None:
    """Its Retry-After is heeded: it goes beyond the deadline, so nothing is asked again."""
    url, script = scripted(Reply(429, SHED_BY_SERVE, {"retry-after": "3600"}, kind="text/plain"))
    with pytest.raises(RewardUnavailable, match=r"429 text/plain: .*max_queued_requests=1"):
        ask(client_of(url), images)
    assert len(script.requests) == 1


def test_a_server_that_is_down_is_unavailable(images: Images, ask: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(RewardUnavailable, match=f":{port}: .*ConnectError"):
        ask(client_of(f"http://127.0.0.1:{port}", 0.3), images)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 415, 422])
def test_a_refusal_is_final(scripted: Any, images: Images, ask: Any, status: int) -> None:
    url, script = scripted(Reply(status, b'{"error": "refused", "detail": "because"}'))
    with pytest.raises(RewardRefused, match=f"'words' at {url}: {status} refused: because"):
        ask(client_of(url), images)
    assert len(script.requests) == 1


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (changed(scores=[0.5, 0.5, float("nan"), 0.5, 0.5]), "scores.2"),
        (changed(scores=[0.5, 0.5, float("inf"), 0.5, 0.5]), "scores.2"),
        (changed(scores=[0.5, 0.5, None, 0.5, 0.5]), r"scores \[2\] are null"),
        (
            changed(scores=[None, *[0.5] * 4], errors=[{"index": 0, "error": "no text"}]),
            "1 of 5 images have no score; item 0: no text",
        ),
        (changed(scores=[0.5] * 4, details=[{}] * 4), "4 scores for 5 images"),
        (changed(scores=[0.5] * 6, details=[{}] * 6), "6 scores for 5 images"),
        (changed(scores=0.5), "scores"),
        (changed(reward="pickscore"), "'pickscore' answered, expected 'fake'"),
        (Reply(body=b"<html>welcome</html>", kind="text/html"), "<html>welcome</html>"),
        (Reply(body=b"<html>welcome</html>"), "welcome"),
        (Reply(body=b""), "answer"),
        (Reply(body=json.dumps(GOOD).encode()[:-3]), "answer"),
        (Reply(302, b"", {"location": "http://elsewhere/"}), "302 to http://elsewhere/"),
        (Reply(body=bytes(17 * 1024 * 1024)), "more than"),
        (Reply(204, b""), "204"),
    ],
)
def test_a_bad_answer_is_an_error_and_never_a_score(
    scripted: Any, images: Images, ask: Any, reply: Reply, says: str
) -> None:
    url, script = scripted(reply)
    with pytest.raises(RewardInvalid, match=says) as caught:
        ask(client_of(url, app="fake"), images)
    assert "'words'" in str(caught.value) and url in str(caught.value)
    assert len(script.requests) == 1


@pytest.mark.parametrize("status", [200, 404, 500])
def test_an_answer_without_an_end_is_read_to_the_limit_and_not_asked_for_again(
    scripted: Any, images: Images, ask: Any, status: int
) -> None:
    url, script = scripted(Reply(status, bytes(1024 * 1024), endless=True))
    script.sent = 0
    with pytest.raises(RewardInvalid, match=f"{status}, more than {MAX_ANSWER_BYTES} bytes"):
        ask(client_of(url, app="fake"), images)
    assert len(script.requests) == 1
    assert script.sent < 4 * MAX_ANSWER_BYTES, "the connection is closed, whatever its buffers hold"


def test_connections_are_used_again(scripted: Any, images: Images) -> None:
    url, script = scripted(Reply())
    client = client_of(url)
    for _ in range(3):
        client.score(images, "p")
    client.close()
    assert len({request["client"] for request in script.requests}) == 1


def test_many_threads_share_a_client(serve_fake: Any) -> None:
    client = client_of(serve_fake(max_pending=64))
    batches = [np.full((2, 3, 3, 3), value, np.uint8) for value in range(24)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda batch: client.score(batch, "p").scores, batches))
    client.close()
    assert answers == [(float(value),) * 2 for value in range(24)]


def test_overload_is_waited_out(serve_fake: Any, fake: Any) -> None:
    """The only place is taken; the client that is shed comes back and is served."""
    url = serve_fake(max_pending=1)
    first, second = client_of(url), client_of(url)
    one = np.zeros((1, 2, 2, 3), np.uint8)
    shed = httpx_status(url, first)
    with ThreadPoolExecutor(2) as pool:
        busy = pool.submit(first.score, one, "hang")
        assert fake.entered.wait(20)
        assert shed() == 429
        late = pool.submit(second.score, one, "p")
        fake.released.set()
        assert busy.result(20).scores == late.result(20).scores == (0.0,)
    first.close()
    second.close()


def httpx_status(url: str, client: RewardClient) -> Callable[[], int]:
    from reward_servers.wire import encode_tensors

    body = encode_tensors(np.zeros((1, 2, 2, 3), np.uint8), "p")
    headers = {
        "Authorization": "Bearer a-token-for-tests-only",
        "Content-Type": "application/vnd.safetensors",
    }
    return lambda: httpx.post(url + "/v1/score", content=body, headers=headers, trust_env=False).status_code
