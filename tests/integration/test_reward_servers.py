"""Both OCR rewards on a real Ray Serve: scores, token, overload, addresses, failures to start."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import ray
from numpy.typing import NDArray
from ray import serve

from benchmarks.timed_scorer import TIMED
from quickstart.render import render
from quickstart.words import prompt_of, train_word
from reward_servers import launch
from reward_servers.client import RewardClient, RewardRefused
from reward_servers.deployment import build, deployment_of
from reward_servers.launch import LOOPBACK, RewardsNotReady, scale_reward, start_rewards, stop_rewards
from reward_servers.protocol import JSON_TYPE, TENSOR_TYPE, ErrorBody
from reward_servers.server_config import ServerConfig
from reward_servers.wire import encode_tensors
from services.config import RewardConfig

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local")]

TOKEN = "a-token-for-tests-only"
REWARDS = (
    RewardConfig(name="words", app="ocr", num_cpus=0.1),
    RewardConfig(name="tesseract", app="ocr_tesseract", heldout=True, num_cpus=0.1),
    RewardConfig(name="elsewhere", url="http://127.0.0.1:9/"),
)
DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rewards") / "token"
    file.touch(0o600)
    file.write_text(TOKEN)
    return file


@pytest.fixture(scope="module")
def taken() -> Iterator[int]:
    """A port that is another's."""
    with socket.create_server((LOOPBACK, 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture(scope="module")
def urls(ray_local: None, token_file: Path, taken: int) -> Iterator[dict[str, str]]:
    """Of a Serve whose first port was taken between the look for it and the start."""
    free, seen_free = launch._free_port, [taken]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_free_port", lambda host: seen_free.pop() if seen_free else free(host))
        found = start_rewards(REWARDS, token_file=token_file, port=0, deadline_s=DEADLINE_S)
    yield found
    stop_rewards()
    stop_rewards()


@pytest.fixture(scope="module")
def words() -> tuple[list[str], NDArray[np.uint8]]:
    rng = random.Random(1)
    chosen = [train_word(rng) for _ in range(8)]
    return [prompt_of(word) for word in chosen], np.stack([render(word, rng) for word in chosen])


def client_of(urls: dict[str, str], name: str, token: str = TOKEN) -> RewardClient:
    return RewardClient(name, urls[name], token, DEADLINE_S)


def _root(urls: dict[str, str]) -> str:
    """The address of Serve."""
    return urls["words"].rsplit("/", 2)[0]


@pytest.mark.parametrize("name", ["words", "tesseract"])
def test_reads_words_the_same_alone_and_together(
    urls: dict[str, str], words: tuple[list[str], NDArray[np.uint8]], name: str
) -> None:
    prompts, images = words
    client = client_of(urls, name)
    together = client.score(images, prompts)
    alone = [client.score(images[i : i + 1], prompts[i]) for i in range(3)]
    client.close()
    assert np.mean(together.scores) > 0.85
    assert [each.scores[0] for each in alone] == list(together.scores[:3])
    assert [each.details[0] for each in alone] == list(together.details[:3])
    assert set(together.details[0]) == {"text", "exact"}


def test_a_port_that_is_taken_meanwhile_is_left_for_another(urls: dict[str, str], taken: int) -> None:
    assert httpx.URL(urls["words"]).port != taken


def test_each_reward_is_an_application_of_its_own(urls: dict[str, str]) -> None:
    assert list(urls) == ["words", "tesseract", "elsewhere"]
    assert urls["elsewhere"] == "http://127.0.0.1:9"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    served = {
        name: httpx.get(urls[name] + "/v1/info", headers=headers, trust_env=False).json()["reward"]
        for name in ("words", "tesseract")
    }
    assert served == {"words": "ocr", "tesseract": "ocr_tesseract"}
    own, others = urls["words"].split("/")[-2], set(serve.status().applications)
    assert others == {f"reward-{own}-words", f"reward-{own}-tesseract"}
    assert urls["tesseract"].endswith(f"/{own}/tesseract")


def test_two_runs_with_a_reward_of_the_same_name_leave_each_other_alone(
    urls: dict[str, str], words: tuple[list[str], NDArray[np.uint8]], tmp_path: Path
) -> None:
    """The second run is another process on the same Ray cluster, with a token of its own."""
    prompts, images = words
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text("the-token-of-another-run")
    first, other = client_of(urls, "words"), another_run()
    try:
        theirs = ray.get(other.start.remote(file), timeout=DEADLINE_S)
        assert theirs["words"] != urls["words"]
        second = client_of(theirs, "words", "the-token-of-another-run")
        assert first.score(images, prompts).scores == second.score(images, prompts).scores
        with pytest.raises(RewardRefused, match="401"):
            client_of(theirs, "words").score(images, prompts)
        second.close()
        ray.get(other.stop.remote(), timeout=DEADLINE_S)
        assert len(first.score(images, prompts).scores) == len(images), "the first run's are still there"
    finally:
        first.close()
        ray.kill(other)


def another_run() -> Any:
    """Its driver. The class is local so that it travels by value: Ray's workers cannot import tests."""

    class Driver:
        def start(self, token_file: Path) -> dict[str, str]:
            return start_rewards(REWARDS[:1], token_file=token_file, port=0, deadline_s=DEADLINE_S)

        def stop(self) -> None:
            stop_rewards()

    return ray.remote(num_cpus=0)(Driver).remote()


def test_serve_outlives_the_run_that_started_it_while_another_uses_it(
    urls: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_started", {})
    monkeypatch.setattr(launch, "_owns_serve", True)
    before = set(serve.status().applications)
    stop_rewards()
    assert set(serve.status().applications) == before


def test_an_application_that_is_not_ours_is_not_replaced(
    urls: dict[str, str], token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.secrets, "token_hex", lambda count: urls["words"].split("/")[-2])
    with pytest.raises(RewardsNotReady, match=r"already has an application 'reward-\w+-words'"):
        start_rewards(REWARDS[:1], token_file=token_file, port=0, deadline_s=DEADLINE_S)
    assert httpx.get(urls["words"] + "/healthz", trust_env=False).status_code == 200


def test_a_scorer_of_another_package_is_served_by_where_it_is(urls: dict[str, str], token_file: Path) -> None:
    timed = RewardConfig(name="timed", app=TIMED, args={"image_s": 0}, num_cpus=0.1)
    found = start_rewards([timed], token_file=token_file, port=0, deadline_s=DEADLINE_S)
    client = RewardClient("timed", found["timed"], TOKEN, DEADLINE_S, app=TIMED)
    try:
        assert client.score(np.zeros((2, 2, 2, 3), np.uint8), "p").scores == (0.0, 0.0)
    finally:
        client.close()


def test_replicas_come_and_go_and_those_that_are_there_stay(urls: dict[str, str], token_file: Path) -> None:
    timed = RewardConfig(name="counted", app=TIMED, args={"image_s": 0}, num_cpus=0.1)
    found = start_rewards([timed], token_file=token_file, port=0, deadline_s=DEADLINE_S)
    client = RewardClient("counted", found["counted"], TOKEN, DEADLINE_S, app=TIMED)

    def processes() -> set[int]:
        title = f"ray::ServeReplica:{urls_owner}-counted:reward"
        seen = psutil.process_iter(["pid", "cmdline"])
        return {one.pid for one in seen if "".join(one.info["cmdline"] or ()).startswith(title)}

    def become(count: int) -> set[int]:
        scale_reward(timed, count, token_file=token_file)
        give_up = time.monotonic() + DEADLINE_S
        while len(there := processes()) != count:
            assert time.monotonic() < give_up, there
            # Whatever comes and goes, every request is answered.
            assert client.score(np.zeros((1, 2, 2, 3), np.uint8), "p").scores == (0.0,)
        return there

    urls_owner = f"reward-{found['counted'].split('/')[-2]}"
    first = become(1)
    assert become(3) > first, "a replica was replaced where others should have come beside it"
    assert len(become(1)) == 1
    client.close()


def test_a_reward_of_somebody_else_is_not_scaled(token_file: Path) -> None:
    with pytest.raises(ValueError, match="reward 'nobodys' was not started here"):
        scale_reward(RewardConfig(name="nobodys", app="jpeg"), 2, token_file=token_file)


def test_a_wrong_token_is_refused(urls: dict[str, str], words: tuple[list[str], NDArray[np.uint8]]) -> None:
    client = client_of(urls, "words", "another-token-altogether")
    with pytest.raises(RewardRefused, match="401 unauthorized"):
        client.score(words[1], words[0])
    client.close()
    assert httpx.get(urls["words"] + "/healthz", trust_env=False).status_code == 200


def test_a_prompt_without_quotes_is_refused(urls: dict[str, str]) -> None:
    client = client_of(urls, "tesseract")
    with pytest.raises(RewardRefused, match=r"422 unprocessable: item 0: .*double quotes"):
        client.score(np.zeros((2, 32, 64, 3), np.uint8), "a cat")
    client.close()


def test_it_listens_on_loopback_only(urls: dict[str, str]) -> None:
    port = httpx.URL(urls["words"]).port
    listening = {
        connection.laddr.ip
        for connection in psutil.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert listening == {"127.0.0.1"}


def test_overload_is_shed_and_waited_out(
    urls: dict[str, str], token_file: Path, words: tuple[list[str], NDArray[np.uint8]]
) -> None:
    """One place and eight who want it: some are told to come back, and all are served in the end."""
    prompts, images = words
    args = {"app": "ocr", "token_file": str(token_file), "max_pending": 1}
    serve.run(build(args), name="narrow", route_prefix="/narrow")
    url = _root(urls) + "/narrow"
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": TENSOR_TYPE}
    body = encode_tensors(images, prompts)

    def post(_: int) -> httpx.Response:
        return httpx.post(
            url + "/v1/score", content=body, headers=headers, timeout=DEADLINE_S, trust_env=False
        )

    client = RewardClient("narrow", url, TOKEN, DEADLINE_S)
    try:
        with ThreadPoolExecutor(8) as pool:
            responses = list(pool.map(post, range(8)))
            scored = list(pool.map(lambda _: client.score(images, prompts).scores, range(8)))
    finally:
        client.close()
        serve.delete("narrow")
    shed = [response for response in responses if response.status_code == 429]
    assert shed and {response.status_code for response in responses} == {200, 429}
    for response in shed:
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["content-type"] == JSON_TYPE
        assert ErrorBody.model_validate_json(response.content).error == "overloaded"
    assert len(set(scored)) == 1


def test_what_serve_sheds_by_itself_has_the_same_body(urls: dict[str, str], token_file: Path) -> None:
    """The replica has room; Serve lets one request through and one wait, and refuses the others."""
    config = ServerConfig(
        app="benchmarks.timed_scorer:create", args={"image_s": 0.5}, token_file=token_file, max_pending=64
    )
    narrow = deployment_of(config).options(max_ongoing_requests=1, max_queued_requests=1)
    serve.run(narrow.bind(config.model_dump(mode="json")), name="queued", route_prefix="/queued")
    url = _root(urls) + "/queued"
    images = np.zeros((1, 2, 2, 3), np.uint8)
    body = encode_tensors(images, "p")
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": TENSOR_TYPE}

    def post(_: int) -> httpx.Response:
        return httpx.post(
            url + "/v1/score", content=body, headers=headers, timeout=DEADLINE_S, trust_env=False
        )

    client = RewardClient("queued", url, TOKEN, DEADLINE_S)
    try:
        with ThreadPoolExecutor(8) as pool:
            responses = list(pool.map(post, range(8)))
            scored = list(pool.map(lambda _: client.score(images, "p"), range(8)))
    finally:
        client.close()
        serve.delete("queued")
    shed = [response for response in responses if response.status_code == 429]
    assert shed and {response.status_code for response in responses} == {200, 429}
    for response in shed:
        assert response.headers["retry-after"] == "1"
        assert response.headers["content-type"] == JSON_TYPE
        answer = ErrorBody.model_validate_json(response.content)
        assert answer.error == "overloaded" and "max_queued_requests" in answer.detail
    assert [each.scores for each in scored] == [(0.0,)] * 8
    assert max(each.attempts for each in scored) > 1, "what Serve shed was asked again"


def test_a_path_that_nobody_serves_is_answered_by_the_protocol(urls: dict[str, str]) -> None:
    url = _root(urls) + "/nowhere/v1/score"
    answer = httpx.post(url, content=b"", trust_env=False)
    assert answer.status_code == 404
    assert ErrorBody.model_validate_json(answer.content).error == "not_found"


def test_a_reward_that_cannot_start_is_named(urls: dict[str, str], token_file: Path) -> None:
    broken = RewardConfig(name="broken", app="ocr", args={"input_width": 97}, num_cpus=0.1)
    before = set(serve.status().applications)
    with pytest.raises(RewardsNotReady, match=r"'broken' \(ocr\) failed to start: .*multiple of 8"):
        start_rewards([broken], token_file=token_file, port=0, deadline_s=DEADLINE_S)
    assert before - set(serve.status().applications) == set(), "rewards that ran before run on"


def test_what_is_not_ready_in_time_is_named(urls: dict[str, str], token_file: Path) -> None:
    # The deadline is also how long Serve waits for what it stops, a replica that never came included.
    homeless = RewardConfig(name="homeless", app="ocr", num_cpus=1000, deadline_s=1)
    with pytest.raises(RewardsNotReady, match=r"not ready within 3 s: homeless: "):
        start_rewards([homeless], token_file=token_file, port=0, deadline_s=3)


def test_an_unknown_scorer_is_refused_at_once(token_file: Path) -> None:
    unknown = RewardConfig(name="unknown", app="nope")
    with pytest.raises(ValueError, match=r"'unknown': no scorer 'nope'; valid: .*ocr"):
        start_rewards([unknown], token_file=token_file, port=0, deadline_s=1)
