"""deploy/serve/rewards.yaml: Serve takes it, every application in it is one of ours, and OCR runs from it."""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import matplotlib
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from ray import serve
from ray.serve.schema import ServeDeploySchema
from ray.util import list_named_actors
from small_runs import Watching

from benchmarks.reward_scaling import SHORTENED
from quickstart.words import prompt_of
from reward_servers.client import RewardClient
from reward_servers.deployment import autoscaling, build
from reward_servers.protocol import INFO_PATH, JSON_TYPE, SCORE_PATH, TENSOR_TYPE, ServerInfo
from reward_servers.scorer import ScorerOptions
from reward_servers.scorers import scorer_names
from reward_servers.server_config import ServerConfig
from reward_servers.wire import ScoreCall, encode_tensors
from services.config import Config
from services.config_file import PROJECT_ROOT
from services.driver import train
from services.run_directory import RunDirectory
from services.telemetry import read_metrics
from tests.ports import free_ports

TOKEN = "a-token-for-tests-only"
DEADLINE_S = 240.0
# Ray's workers inherit the environment of the moment in which Ray starts.
os.environ["DGPO_REWARD_TOKEN"] = TOKEN

RAW: dict[str, Any] = yaml.safe_load((PROJECT_ROOT / "deploy" / "serve" / "rewards.yaml").read_text())
APPLICATIONS = {application["name"]: application for application in RAW["applications"]}
OCR = ("reward-ocr", "reward-ocr-tesseract")


def test_serve_takes_the_file() -> None:
    schema = ServeDeploySchema.model_validate(RAW)
    assert schema.http_options.host == "127.0.0.1"
    deadlines = [ServerConfig.model_validate(app.args).deadline_s for app in schema.applications]
    assert schema.http_options.request_timeout_s > max(deadlines), "the replica says first what is wrong"
    assert len({app.route_prefix for app in schema.applications}) == len(schema.applications)
    assert TOKEN not in str(RAW) and "token_file" not in str(RAW)


def test_every_reward_has_an_application() -> None:
    assert {application["args"]["app"] for application in APPLICATIONS.values()} == set(scorer_names())


@pytest.mark.parametrize("name", APPLICATIONS)
def test_its_scorer_takes_its_arguments(name: str) -> None:
    application = APPLICATIONS[name]
    config = ServerConfig.model_validate(application["args"])
    module = importlib.import_module(f"reward_servers.scorers.{config.app}")
    options = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, ScorerOptions) and kind.__module__ == module.__name__
    ]
    assert options, "no options to check the arguments by"
    for kind in options:
        kind.model_validate(config.args)
    (deployment,) = application["deployments"]
    assert deployment["name"] == "reward", "Serve would refuse settings of a deployment that there is not"
    gpus = deployment["ray_actor_options"].get("num_gpus", 0)
    assert (config.args.get("device") == "cuda") is (gpus > 0)


def test_the_autoscaling_policy_is_that_of_rewards_that_the_driver_starts() -> None:
    policies = [
        deployment["autoscaling_config"]
        for application in APPLICATIONS.values()
        for deployment in application["deployments"]
        if "autoscaling_config" in deployment
    ]
    assert policies
    for policy in policies:
        assert policy == autoscaling(policy["min_replicas"], policy["max_replicas"])
    assert set(SHORTENED) < set(policies[0]), "the bench shortens what there is"


def test_the_router_is_named_where_the_controller_would_import_it() -> None:
    """It makes a deployment anew that a file overrides, and has the class only if the file names it."""
    router = build({"app": "jpeg", "token_env": "A_TOKEN"})._bound_deployment._deployment_config
    for application in APPLICATIONS.values():
        for deployment in application["deployments"]:
            named = deployment["request_router_config"]["request_router_class"]
            assert named == router.request_router_config.request_router_class


def test_the_ocr_of_the_file_reads_pictures() -> None:
    """What a text-to-image model makes is no line of text."""
    from reward_servers.scorers import load_scorer

    for name in OCR:
        given = APPLICATIONS[name]["args"]
        (item,) = load_scorer(given["app"], given["args"]).score(
            ScoreCall([sign("HELLO")], [prompt_of("HELLO")], [{}])
        )
        assert item.score == 1.0, item.details


def sign(word: str) -> NDArray[np.uint8]:
    """(512, 512, 3), a word somewhere in it."""
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    image = Image.new("RGB", (512, 512), (210, 220, 230))
    ImageDraw.Draw(image).text((120, 300), word, (20, 20, 40), font=ImageFont.truetype(str(font), 64))
    return np.asarray(image)


def _serve_is_gone() -> bool:
    return not any(
        actor["name"] == "SERVE_CONTROLLER_ACTOR" for actor in list_named_actors(all_namespaces=True)
    )


def until(condition: Callable[[], bool], what: str) -> None:
    """Polls: Serve has no event for it."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def address(ray_local: None) -> Iterator[str]:
    """The OCR applications of the file, deployed as `serve deploy` does it; their common address."""
    from ray.serve.context import _get_global_client

    (port,) = free_ports(1)
    raw = RAW | {
        "applications": [APPLICATIONS[name] for name in OCR],
        "http_options": RAW["http_options"] | {"port": port},
    }
    schema = ServeDeploySchema.model_validate(raw)
    # Whoever had Serve before may have left a controller that is still ending.
    serve.shutdown()
    until(_serve_is_gone, "the former Serve has ended")
    serve.start(
        proxy_location=schema.proxy_location,
        http_options=schema.http_options.model_dump(exclude_unset=True),
        controller_options={
            "runtime_env": {"env_vars": {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(DEADLINE_S)}}
        },
    )
    _get_global_client().deploy_apps(schema)

    def run() -> bool:
        applications = serve.status().applications
        return all(name in applications and applications[name].status == "RUNNING" for name in OCR)

    try:
        until(run, "both applications run")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


@pytest.mark.integration
@pytest.mark.parametrize("name", OCR)
def test_a_deployed_reward_scores(address: str, name: str) -> None:
    words = ["HELLO", "MOON", "RIVER"]
    images = np.stack([sign(word) for word in words])
    application = APPLICATIONS[name]
    url = address + application["route_prefix"]
    client = RewardClient("words", url, TOKEN, DEADLINE_S, app=application["args"]["app"])
    try:
        assert np.mean(client.score(images, [prompt_of(word) for word in words]).scores) > 0.85
    finally:
        client.close()
    refused = httpx.get(url + INFO_PATH, trust_env=False)
    assert (refused.status_code, refused.json()["error"]) == (401, "unauthorized")


@pytest.mark.integration
def test_what_the_file_says_is_what_runs(address: str) -> None:
    deployed = serve.status().applications["reward-ocr"].deployments["reward"]
    assert set(deployed.replica_states) == {"RUNNING"}
    said = _deployment_config("reward-ocr")
    wanted = APPLICATIONS["reward-ocr"]["deployments"][0]
    assert said["autoscaling_config"]["max_replicas"] == wanted["autoscaling_config"]["max_replicas"]
    assert said["graceful_shutdown_timeout_s"] == APPLICATIONS["reward-ocr"]["args"]["deadline_s"]
    assert said["backpressure_config"] == {"status_code": 429, "retry_after_s": 1}


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_reward_is_scaled_updated_and_rolled_back_under_a_run(
    address: str, recipe: Callable[..., Config], tmp_path: Path
) -> None:
    """No group is lost, none is trained twice, and the groups are scored by what is served at that time.

    Without held-out prompts nothing is evaluated.
    """
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(prompt_of(word) for word in ("HELLO", "MOON", "RIVER", "STONE")))
    plain = APPLICATIONS["reward-ocr"]["args"] | {"args": {}}
    strict = plain | {"args": {"match": "exact"}}
    two = {"num_replicas": 2, "autoscaling_config": None}
    changes = {"scaled": _ocr(plain, **two), "updated": _ocr(strict, **two), "rolled back": _ocr(plain)}
    _deploy(_ocr(plain))
    directory = RunDirectory.create(
        recipe(
            *("rollout.workers=2", "learner.max_steps=10000", "checkpoint.every_steps=100"),
            f"prompts={{source: file, path: {prompts}}}",
            f"rewards=[{{name: ocr, url: '{address}/ocr', token_env: DGPO_REWARD_TOKEN}}]",
        )
    )
    made: list[str] = []

    def step() -> int:
        rows = read_metrics(directory.root).updates
        return rows[-1].step if rows else 0

    def trained_further(what: str) -> None:
        before = step()
        until(lambda: step() >= before + 2, f"{what}, the run goes on")

    def change() -> None:
        try:
            trained_further("before")
            for what, application in changes.items():
                _deploy(application)
                until(lambda wanted=application: _runs(address, wanted), what)  # type: ignore[misc]
                trained_further(what)
                made.append(what)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        changed = pool.submit(change)
        outcome = train(directory.config(), directory, Watching())
        changed.result()
    assert made == list(changes) and outcome.interrupted
    written = read_metrics(directory.root)
    trained = [ordinal for row in written.updates for ordinal in row.ordinals]
    assert sorted(trained) == list(range(2 * outcome.version.step))
    assert [row.what for row in written.events if row.level != "info"] == []


def _ocr(arguments: dict[str, Any], **deployment: Any) -> dict[str, Any]:
    application = APPLICATIONS["reward-ocr"]
    (told,) = application["deployments"]
    settings = {name: value for name, value in (told | deployment).items() if value is not None}
    return {**application, "args": arguments, "deployments": [settings]}


def _deploy(application: dict[str, Any]) -> None:
    """What `serve deploy` does with a file of this one alone."""
    from ray.serve.context import _get_global_client

    schema = ServeDeploySchema.model_validate(RAW | {"applications": [application]})
    _get_global_client().deploy_apps(schema)


def _runs(address: str, application: dict[str, Any]) -> bool:
    """As many replicas as it wants, and all of them of its scorer."""
    arguments, deployment = application["args"], application["deployments"][0]
    deployed = serve.status().applications["reward-ocr"].deployments.get("reward")
    if deployed is None or deployed.replica_states != {"RUNNING": deployment.get("num_replicas", 1)}:
        return False
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = httpx.get(f"{address}/ocr{INFO_PATH}", headers=headers, timeout=DEADLINE_S, trust_env=False)
    served = ServerInfo.model_validate_json(answer.content).version
    return served == _version(arguments["app"], json.dumps(arguments["args"]))


@functools.cache
def _version(app: str, arguments: str) -> str:
    from reward_servers.scorers import load_scorer

    return load_scorer(app, json.loads(arguments)).version


def _deployment_config(application: str) -> dict[str, Any]:
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()
    config: dict[str, Any] = details["applications"][application]["deployments"]["reward"][
        "deployment_config"
    ]
    return config


@pytest.mark.integration
def test_a_replica_that_is_taken_away_answers_what_it_has(address: str) -> None:
    """Its only place is taken by a request that takes a while; then it is deleted."""
    arguments = {
        "app": "benchmarks.timed_scorer:create",
        "args": {"image_s": 1.0},
        "token_env": "DGPO_REWARD_TOKEN",
        "max_pending": 1,
    }
    serve.run(build(arguments), name="going", route_prefix="/going")
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": TENSOR_TYPE}

    def post(count: int) -> httpx.Response:
        return httpx.post(
            f"{address}/going{SCORE_PATH}",
            content=encode_tensors(np.zeros((count, 2, 2, 3), np.uint8), "p"),
            headers=headers,
            timeout=DEADLINE_S,
            trust_env=False,
        )

    def admitted() -> httpx.Response:
        while (answer := post(4)).status_code == 429:
            pass
        return answer

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(admitted)
        until(lambda: post(1).status_code == 429 or asked.done(), "the place is taken")
        assert not asked.done()
        serve.delete("going")
        answer = asked.result(DEADLINE_S)
    assert (answer.status_code, answer.headers["content-type"]) == (200, JSON_TYPE)
    assert answer.json()["scores"] == [0.0] * 4
