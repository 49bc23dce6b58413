"""`dgpo reward`: reward servers on their own, without a run: list, serve, score, bench.

Promises
- `serve` binds loopback unless told otherwise, and never serves without a token; when it is stopped it first
  answers what it has admitted.
- `score` gives in this process what a server of the same scorer would give: it runs the same engine.
- No scorer is imported before it is needed; `list` imports none.
"""

from __future__ import annotations

import ast
import json
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.cli_options import Json, emit, screen
from services.config_file import ConfigError
from services.exit_codes import FAILED

if TYPE_CHECKING:
    from reward_servers.scorer import ItemScore
    from reward_servers.server_config import ServerConfig
    from reward_servers.tls import ServerCertificate

reward = typer.Typer(
    help="Reward servers on their own: serve one, score images, measure.", no_args_is_help=True
)

ScorerArgs = Annotated[
    str, typer.Option("--args", metavar="JSON", help="Arguments of the scorer, as a JSON object.")
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="CPU threads of the scorer.")]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help="File with the bearer token, mode 0600.")
]
TokenEnv = Annotated[str | None, typer.Option("--token-env", help="Variable that holds the bearer token.")]


def default_token_file() -> Path:
    """Where `serve` keeps the token that it makes, and `score --url` looks for one."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "dgpo" / "reward-token"


@reward.command("list")
def list_scorers(as_json: Json = False) -> None:
    """List the scorers: what `serve` and `score --app` take."""
    from reward_servers.scorers import scorer_names

    summaries = {name: _summary(name) for name in scorer_names()}
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("app", no_wrap=True)
    table.add_column("what it scores")
    for name, summary in summaries.items():
        table.add_row(name, Text(summary))
    if as_json:
        screen.print(table)
        emit({"scorers": [{"app": name, "summary": summary} for name, summary in summaries.items()]})
    else:
        Console().print(table)


@reward.command()
def serve(
    app: Annotated[str, typer.Argument(help="A scorer (dgpo reward list), or package.module:create.")],
    args: ScorerArgs = "{}",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8100,
    token_file: TokenFile = None,
    token_env: TokenEnv = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option("--tls-cert", help="PEM file of a certificate: serves https. With --tls-key."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", help="PEM file of its key, without a passphrase.")
    ] = None,
    threads: Threads = 1,
    batching: Annotated[str, typer.Option("--batching", help="request, or dynamic: merge requests.")] = (
        "request"
    ),
    deadline: Annotated[float, typer.Option("--deadline", help="Seconds for one request.")] = 60.0,
    max_pending: Annotated[
        int, typer.Option("--max-pending", min=1, help="Requests held at once; more get 429.")
    ] = 16,
    as_json: Json = False,
) -> None:
    """Serve one scorer over HTTP until interrupted. Without a token one is made and kept in a file."""
    certificate = _certificate(tls_cert, tls_key)
    if token_file is None and token_env is None:
        from reward_servers.server_config import make_token_file

        token_file = default_token_file()
        made = make_token_file(token_file)
        screen.print(Text(f"token: {'made' if made else 'read from'} {token_file}"), soft_wrap=True)
    config = _server_config(
        app=app,
        args=_object(args, "--args"),
        token_file=token_file,
        token_env=token_env,
        threads=threads,
        batching=batching,
        deadline_s=deadline,
        max_pending=max_pending,
    )
    from reward_servers.app import create_app
    from reward_servers.local import LOOPBACK, serve_until_stopped

    def ready(url: str) -> None:
        screen.print(Text(f"serving {app} at {url}; stop with Ctrl-C"), soft_wrap=True)
        if certificate is None and host not in (LOOPBACK, "localhost", "::1"):
            screen.print(
                "plain HTTP: without --tls-cert, or TLS in front of it, the token can be read on its way"
            )
        if as_json:
            emit({"app": app, "url": url, "token_file": None if token_file is None else str(token_file)})
            sys.stdout.flush()

    try:
        served = create_app(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    serve_until_stopped(
        served, host=host, port=port, drain_s=deadline, on_ready=ready, certificate=certificate
    )


@reward.command()
def score(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    prompt: Annotated[str, typer.Option("--prompt", help="What the images were made from.")],
    metadata: Annotated[
        str, typer.Option("--metadata", metavar="JSON", help="What the scorer needs beside the prompt.")
    ] = "{}",
    app: Annotated[
        str | None, typer.Option("--app", help="Score in this process, with this scorer (as of serve).")
    ] = None,
    args: ScorerArgs = "{}",
    threads: Threads = 1,
    url: Annotated[
        str | None,
        typer.Option("--url", help="Or ask the server at this address."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait up to --deadline for a server that is not there yet.")
    ] = False,
    token_file: TokenFile = None,
    token_env: TokenEnv = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-ca", help="PEM file of an authority to trust beside the system's; with https://."
        ),
    ] = None,
    deadline: Annotated[float, typer.Option("--deadline", help="Seconds for all scores.")] = 60.0,
    as_json: Json = False,
) -> None:
    """Score image files against a prompt, by a server or in this process."""
    if (app is None) == (url is None):
        raise ConfigError("give either --app, to score in this process, or --url of a server")
    if not 0 < deadline < math.inf:
        raise ConfigError(f"--deadline: expected seconds above 0, found {deadline}")
    if url is not None and (args != "{}" or threads != 1):
        raise ConfigError("--args and --threads are of --app; a server has its own, which serve takes")
    if app is not None and (token_file is not None or token_env is not None or wait):
        raise ConfigError("--token-file, --token-env and --wait are of --url; --app scores in this process")
    if tls_ca is not None and not (url or "").startswith("https://"):
        raise ConfigError(f"--tls-ca is for a --url that begins with https://, found {url or '--app'}")
    from reward_servers.image_files import read_image, score_by_server, score_here
    from reward_servers.tls import read_authority

    extra = _object(metadata, "--metadata")

    def waits(why: str) -> None:
        screen.print(Text(f"{why}; asking again for up to {deadline:g} s"), soft_wrap=True)

    try:
        pixels = [read_image(path) for path in images]
        if app is not None:
            arguments = _object(args, "--args")
            result, items = score_here(app, arguments, threads, pixels, prompt, extra, deadline)
        else:
            assert url is not None
            token = _token(token_file, token_env, url)
            result, items = score_by_server(
                *(url, token, pixels, prompt, extra, deadline),
                waits=waits if wait else None,
                authority=None if tls_ca is None else read_authority(tls_ca),
            )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    Console(stderr=as_json).print(_scores_table(images, items))
    if as_json:
        result["images"] = [str(path) for path in images]
        result["scores"] = [item.score for item in items]
        result["details"] = [item.details for item in items]
        result["errors"] = [{"index": i, "error": item.error} for i, item in enumerate(items) if item.error]
        emit(result)
    if any(item.error for item in items):
        raise typer.Exit(FAILED)


@reward.command()
def bench(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PART]...", help="throughput, bodies, proxy, scaling, division, overload; default: all."
        ),
    ] = None,
    requests: Annotated[int, typer.Option("--requests", min=100, help="Requests of the overload.")] = 10_000,
    replicas: Annotated[
        int,
        typer.Option("--replicas", min=2, help="Most of the scaling; those of the division."),
    ] = 4,
    passes: Annotated[int, typer.Option("--passes", min=1, help="Of each side of a comparison.")] = 9,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Of one pass.")] = 3.0,
    as_json: Json = False,
) -> None:
    """What serving costs over the scorer alone; scaling; groups in several requests; overload."""
    from benchmarks.reward import PARTS, run_reward_bench

    unknown = sorted(set(parts or ()) - set(PARTS))
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: valid are {', '.join(PARTS)}")
    result = run_reward_bench(
        screen,
        parts=tuple(parts or PARTS),
        requests=requests,
        most=replicas,
        passes=passes,
        pass_s=seconds,
    )
    if as_json:
        emit(result)


def _summary(name: str) -> str:
    """The first line of a scorer's docstring, read from its source: importing it may take seconds."""
    spec = find_spec(f"reward_servers.scorers.{name}")
    if spec is None or spec.origin is None:
        return ""
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def _object(text: str, option: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{option}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{option}: expected a JSON object, found {text:.80}")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _server_config(**fields: Any) -> ServerConfig:
    from pydantic import ValidationError

    from reward_servers.protocol import explained
    from reward_servers.scorers import require_scorer
    from reward_servers.server_config import ServerConfig

    try:
        require_scorer(fields["app"])
        config = ServerConfig.model_validate(fields)
        config.token()
    except ValidationError as error:
        raise ConfigError(explained(error, "token")) from error
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    return config


def _certificate(chain: Path | None, key: Path | None) -> ServerCertificate | None:
    from reward_servers.tls import ServerCertificate

    if chain is None and key is None:
        return None
    if chain is None or key is None:
        raise ConfigError("--tls-cert and --tls-key go together: give both, or none for plain HTTP")
    try:
        certificate = ServerCertificate(chain, key)
        certificate.check()
    except ValueError as error:
        raise ConfigError(f"--tls-cert and --tls-key: {error}") from error
    return certificate


def _token(file: Path | None, env: str | None, url: str) -> str | None:
    """The token for a server: what is named, else, on this machine alone, what `serve` has left."""
    from reward_servers.exchange import is_loopback
    from reward_servers.server_config import read_token

    if env is not None:
        token = os.environ.get(env, "").strip()
        if not token:
            raise ConfigError(f"the environment variable {env} is not set: it must hold a token")
        return token
    if file is None and default_token_file().exists() and is_loopback(urlsplit(url).hostname or ""):
        file = default_token_file()
    if file is None:
        return None
    try:
        return read_token(file)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def _scores_table(images: list[Path], items: list[ItemScore]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("image", "score", "details"):
        table.add_column(heading, justify="right" if heading == "score" else "left")
    for path, item in zip(images, items, strict=True):
        shown = "-" if item.score is None else f"{item.score:.4f}"
        said = item.error or ", ".join(f"{key}: {value}" for key, value in item.details.items())
        table.add_row(Text(str(path)), shown, Text(said, style="red" if item.error else ""))
    return table
