"""Serves DeQA-Score in its own environment; the package's docstring says how to make it.

Promises
- Without `--allow-remote-code`, without the model's directory, or beside another transformers than the one
  its code was written for, it exits with 2 before anything of the model is imported.
- The hub is never asked: what runs is what lies in the directory.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from reward_servers.app import create_app
from reward_servers.local import LOOPBACK, serve_until_stopped
from reward_servers.server_config import ServerConfig

TRANSFORMERS: Final = "4.36.1"
NEEDED: Final = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
"""Files by which the model's directory is recognised."""

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve DeQA-Score until interrupted."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if refused := _refused(given):
        parser.error(refused)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Read when transformers is imported, which is below.
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    try:
        config = ServerConfig(
            app="deqa",
            token_env=given.token_env,
            token_file=given.token_file,
            batching=given.batching,
            deadline_s=given.deadline_s,
        )
        config.token()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    # torch and transformers: seconds that no refusal should have to wait for.
    from reward_servers.deqa.scorer import DeqaOptions, DeqaScorer

    scorer = DeqaScorer(
        DeqaOptions(
            model=given.model,
            device=given.device,
            dtype=given.dtype,
            max_batch=given.max_batch,
            divide_by=given.divide_by,
        )
    )
    serve_until_stopped(
        create_app(config, scorer=scorer),
        host=given.host,
        port=given.port,
        drain_s=10.0,
        on_ready=lambda url: log.info("deqa is served at %s", url),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m reward_servers.deqa", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of DeQA-Score-Mix3")
    parser.add_argument(
        "--allow-remote-code", action="store_true", help="run the Python files that lie in that directory"
    )
    token = parser.add_mutually_exclusive_group(required=True)
    token.add_argument("--token-env", help="environment variable with the bearer token")
    token.add_argument("--token-file", type=Path, help="file with the bearer token, mode 0600")
    parser.add_argument("--host", default=LOOPBACK)
    parser.add_argument("--port", type=int, default=8107)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--max-batch", type=int, default=8, help="images through the network at once")
    parser.add_argument("--divide-by", type=float, default=1.0, help="5 gives scores in 0.2..1")
    parser.add_argument("--batching", choices=("request", "dynamic"), default="request")
    parser.add_argument("--deadline-s", type=float, default=60.0, help="seconds for one request")
    return parser


def _refused(given: argparse.Namespace) -> str | None:
    """Why the model is not loaded, if it is not."""
    if not given.allow_remote_code:
        return (
            "DeQA-Score runs Python files that lie beside its weights: read them, or trust whoever made "
            "them, and say --allow-remote-code"
        )
    if missing := [name for name in NEEDED if not (given.model / name).is_file()]:
        return (
            f"--model {given.model}: no {', '.join(missing)} there; it must be a local directory with all "
            "of the repository zhiyuanyou/DeQA-Score-Mix3"
        )
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = "none"
    if found != TRANSFORMERS:
        return (
            f"the model's code is written for transformers {TRANSFORMERS} and patches Llama where it is "
            f"imported; found {found}: give it an environment of its own, "
            "pip install -r reward_servers/deqa/requirements.txt"
        )
    return None


if __name__ == "__main__":
    main()
