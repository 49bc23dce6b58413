"""`dgpo ui`: one run in a browser.

Promises
- Listens on loopback unless a host is named, and then says what that means; never answers without the token.
- The token is random and new at each start, or of the variable that --token-env names; it is printed as part
  of the address, and in no log.
"""

from __future__ import annotations

import html
import os
import secrets
import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.text import Text

from services.cli_options import Json, emit, screen
from services.config_file import ConfigError


def ui(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8200,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; beyond loopback only if you say so.")
    ] = "127.0.0.1",
    token_env: Annotated[
        str | None, typer.Option("--token-env", help="Variable that holds the token; none: a random one.")
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option("--compare", metavar="OTHER_RUN", help="Show how its settings differ; repeatable."),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    as_json: Json = False,
) -> None:
    """Watch a run in a browser: curves, groups, workers, queue, configuration. Reads only; until Ctrl-C."""
    from reward_servers.local import serve_until_stopped
    from services.run_directory import RunDirectory
    from services.ui.access import is_loopback, names_of, token_of
    from services.ui.app import create_app
    from services.ui.watch import Watch

    run = RunDirectory.open(run_dir)
    others = {other.name: other.root for other in map(RunDirectory.open, compare or ())}
    token = secrets.token_urlsafe(32) if token_env is None else token_of(token_env)
    watch = Watch(run)
    app = create_app(
        watch, token=token, compare=others, hosts=names_of(host), any_address=not is_loopback(host)
    )

    def ready(url: str) -> None:
        address = f"{url}/?token={quote(token, safe='')}"
        screen.print(Text(f"watching {run.name}; stop with Ctrl-C"), soft_wrap=True)
        screen.print(Text(f"open {address}"), soft_wrap=True)
        if is_loopback(host):
            _, _, at = url.rpartition(":")
            told = f"from another machine: ssh -L {at}:127.0.0.1:{at} THIS_MACHINE, then the same address"
        else:
            told = (
                f"listens on {host}, beyond this machine: whoever reaches it and has the token sees prompts, "
                "images and scores, and the token travels in clear text; an SSH tunnel to loopback is safer"
            )
        screen.print(Text(told), soft_wrap=True)
        if as_json:
            emit({"run": run.name, "url": url, "address": address})
        if open_browser and not _opened(address, Path(folder)):
            screen.print("no browser was found on this machine: open the address yourself")

    try:
        with tempfile.TemporaryDirectory(prefix="dgpo-ui-") as folder:
            serve_until_stopped(
                app, host=host, port=port, drain_s=2, on_ready=ready, on_stopping=watch.close_soon
            )
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}; --port 0 takes a free one"
        ) from error


def _opened(address: str, folder: Path) -> bool:
    """Through a file of ours alone: everybody on this machine can read the command line of a browser."""
    page = folder / "open.html"
    page.write_text(f'<!doctype html><meta http-equiv="refresh" content="0; url={html.escape(address)}">\n')
    return webbrowser.open(page.as_uri())
