"""`dgpo reward`: what it lists, scores in this process, and refuses. Servers: tests/integration."""

from __future__ import annotations

import json
import random
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quickstart.render import render
from quickstart.words import prompt_of
from reward_servers.image_files import read_image
from reward_servers.scorers import scorer_names
from services.cli import app
from services.cli_reward import default_token_file
from services.exit_codes import run

Dgpo = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dgpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dgpo:
    """Runs `dgpo reward ARGUMENTS` among some files; its exit code, standard output and standard error."""
    rng = random.Random(1)
    Image.fromarray(render("K7QX", rng)).save(tmp_path / "K7QX.png")
    Image.fromarray(render("MOON", rng)).resize((96, 48)).save(tmp_path / "MOON.png")
    Image.new("RGBA", (8, 8)).save(tmp_path / "see-through.png")
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(tmp_path / "deep.png")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "text.png").write_text("no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dgpo", "reward", *arguments])
        with pytest.raises(SystemExit) as ended:
            run(app)
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return call


def test_it_lists_every_scorer_with_a_line(dgpo: Dgpo) -> None:
    code, out, _ = dgpo("list", "--json")
    listed = json.loads(out.splitlines()[-1])["scorers"]
    assert code == 0
    assert [entry["app"] for entry in listed] == scorer_names()
    assert all(entry["summary"] for entry in listed)


def test_images_of_several_sizes_are_scored_here(dgpo: Dgpo) -> None:
    code, out, shown = dgpo(
        "score", "K7QX.png", "MOON.png", "--prompt", prompt_of("MOON"), "--app", "ocr", "--json"
    )
    result = json.loads(out.splitlines()[-1])
    assert code == 0
    assert result["scores"] == [0.0, 1.0]
    assert (result["reward"], result["images"], result["errors"]) == ("ocr", ["K7QX.png", "MOON.png"], [])
    assert "MOON.png" in shown, "the table is for people"


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4))
    held = image.getexif()
    held[0x0112] = 6
    image.save(tmp_path / "held.jpg", exif=held)
    assert read_image(tmp_path / "held.jpg").shape == (8, 4, 3)


def test_an_image_without_a_score_makes_it_fail(dgpo: Dgpo, monkeypatch: pytest.MonkeyPatch) -> None:
    from reward_servers.scorer import ItemScore
    from reward_servers.scorers.ocr import OcrScorer

    monkeypatch.setattr(OcrScorer, "score", lambda self, call: [ItemScore(float("nan"))] * len(call))
    code, out, _ = dgpo("score", "K7QX.png", "--prompt", '"K7QX"', "--app", "ocr", "--json")
    result = json.loads(out.splitlines()[-1])
    assert (code, result["scores"]) == (1, [None])
    assert "nan" in result["errors"][0]["error"]


def test_a_token_is_made_once_and_only_for_its_owner(dgpo: Dgpo) -> None:
    # The scorer's arguments are wrong, and so nothing is served; the token has been seen to before.
    _, _, first = dgpo("serve", "ocr", "--args", '{"x": 1}')
    made = default_token_file()
    token = made.read_text()
    assert f"token: made {made}" in first
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    _, _, second = dgpo("serve", "ocr", "--args", '{"x": 1}')
    assert f"token: read from {made}" in second
    assert made.read_text() == token and token.strip() not in first + second


@pytest.mark.parametrize(
    ("url", "told"),
    [("http://127.0.0.1:1", True), ("http://localhost:1", True), ("https://h.example/x", False)],
)
def test_the_token_of_this_machine_goes_to_no_other(
    dgpo: Dgpo, monkeypatch: pytest.MonkeyPatch, url: str, told: bool
) -> None:
    dgpo("serve", "ocr", "--args", '{"x": 1}')
    sent: list[str | None] = []

    def refuse(url: str, token: str | None, *more: object, **settings: object) -> None:
        sent.append(token)
        raise ValueError("asked")

    monkeypatch.setattr("reward_servers.image_files.score_by_server", refuse)
    assert dgpo("score", "MOON.png", "--prompt", '"A"', "--url", url)[0] == 2
    assert sent == [default_token_file().read_text().strip() if told else None]


def test_a_server_that_is_not_there_is_waited_for_only_if_asked(dgpo: Dgpo) -> None:
    with socket.socket() as bound:  # and not listening: a connection is refused
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        asked = ["score", "MOON.png", "--prompt", '"A"', "--url", f"{url}/v1/score", "--deadline"]
        code, _, shown = dgpo(*asked, "3600")
        assert code == 1
        assert f"at {url}: nothing answers there (ConnectError" in shown and "--wait" in shown
        code, _, shown = dgpo(*asked, "0.5", "--wait")
    assert code == 1
    assert f"nothing answers at {url} (ConnectError" in shown and "asking again for up to 0.5 s" in shown
    assert "no scores within 0.5 s" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["score", "text.png", "--prompt", '"A"', "--app", "ocr"], "text.png: cannot be read as an image"),
        (["score", "absent.png", "--prompt", '"A"', "--app", "ocr"], "absent.png: cannot be read"),
        (["score", "see-through.png", "--prompt", '"A"', "--app", "ocr"], "transparency"),
        (["score", "deep.png", "--prompt", '"A"', "--app", "ocr"], "8 bits"),
        (["score", "moving.gif", "--prompt", '"A"', "--app", "ocr"], "several pictures"),
        (["score", ".", "--prompt", '"A"', "--app", "ocr"], "Is a directory"),
        (["score", "-", "--prompt", '"A"', "--app", "ocr"], "-: cannot be read"),
        (["score", "MOON.png", "--prompt", "no quotes", "--app", "ocr"], "double quotes"),
        (["score", "MOON.png", "--prompt", '"A"', "--app", "jpeg", "--metadata", '{"a": NaN}'], "NaN is no"),
        (["score", "MOON.png", "--prompt", '"A"', "--app", "jpeg", "--metadata", "[" * 9999], "--metadata"),
        (["score", "MOON.png", "--prompt", '"A"', "--app", "jpeg", "--deadline", "nan"], "above 0"),
        (["score", "MOON.png", "--prompt", '"A"', "--app", "jpeg", "--deadline", "inf"], "above 0"),
        (["score", "MOON.png", "--prompt", '"A"', "--url", "http://h", "--deadline", "0"], "above 0"),
        (["score", "MOON.png", "--prompt", '"A"', "--url", "http://[::1"], "Invalid port"),
        (["score", "MOON.png", "--prompt", '"A"', "--url", "http://u:p@h"], "holds a password"),
        (["serve", "ocr", "--args", '{"model_path": "absent.onnx"}'], "absent.onnx: no ONNX network"),
        (["serve", "ocr", "--args", '{"model_path": "text.png"}'], "text.png: no ONNX network"),
        (["serve", "ocr_tesseract", "--args", '{"language": "xyz"}'], "'xyz' is not in"),
        (["score", "MOON.png", "--prompt", '"A"', "--app", "nope"], "no scorer 'nope'"),
        (["score", "MOON.png", "--prompt", '"A"'], "either --app"),
        (["score", "MOON.png", "--prompt", '"A"', "--app", "ocr", "--metadata", "[1]"], "--metadata"),
        (["score", "MOON.png", "--prompt", '"A"', "--app", "ocr", "--args", "{"], "--args: not JSON"),
        (
            ["score", "MOON.png", "--prompt", '"A"', "--app", "ocr", "--args", '{"x": 1}'],
            "no such argument: x",
        ),
        (["score", "MOON.png", "--prompt", '"A"', "--url", "nowhere"], "no http://"),
        (["score", "MOON.png", "--prompt", '"A"', "--url", "http://h", "--args", '{"x": 1}'], "of --app"),
        (["score", "MOON.png", "--prompt", '"A"', "--app", "jpeg", "--token-env", "T"], "of --url"),
        (
            ["score", "MOON.png", "--prompt", '"A"', "--url", "http://h", "--tls-ca", "x"],
            "with https://, found",
        ),
        (["score", "MOON.png", "--prompt", '"A"', "--app", "jpeg", "--tls-ca", "x"], "found --app"),
        (
            ["score", "MOON.png", "--prompt", '"A"', "--url", "https://h", "--tls-ca", "x"],
            "x: cannot be read",
        ),
        (["serve", "ocr", "--tls-cert", "text.png"], "go together"),
        (["serve", "ocr", "--tls-key", "text.png"], "go together"),
        (["serve", "ocr", "--tls-cert", "text.png", "--tls-key", "absent"], "absent: cannot be read"),
        (["serve", "ocr", "--tls-cert", "text.png", "--tls-key", "text.png"], "no PEM certificate"),
        (["serve", "nope"], "no scorer 'nope'; valid: "),
        (["serve", "ocr", "--token-env", "NO_SUCH_TOKEN"], "NO_SUCH_TOKEN"),
        (["serve", "ocr", "--token-file", "absent"], "absent"),
        (["serve", "ocr", "--batching", "never"], "batching"),
        (["serve", "ocr", "--args", '{"x": 1}'], "no such argument: x"),
        (["bench", "nothing"], "throughput"),
    ],
)
def test_wrong_usage_is_named_and_exits_with_2(dgpo: Dgpo, arguments: list[str], says: str) -> None:
    code, _, shown = dgpo(*arguments)
    assert code == 2, shown
    assert says in shown
    assert "Traceback" not in shown


def test_a_scorer_of_another_package_scores_here(dgpo: Dgpo) -> None:
    timed = "benchmarks.timed_scorer:create"
    code, out, _ = dgpo(
        "score", "K7QX.png", "--prompt", "p", "--app", timed, "--args", '{"image_s": 0}', "--json"
    )
    result = json.loads(out.splitlines()[-1])
    assert (code, result["reward"], len(result["scores"])) == (0, timed, 1)
