"""`python -m policy MODEL [--height H --width W]`: how the stock pipeline of a model steps, as a `rollout`
section. Only configurations are read, no weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import yaml

from policy.errors import PolicyError
from policy.registry import stock_rollout
from services.config import ModelConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Print it; 2 if the model cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m policy", description=__doc__)
    parser.add_argument("model", help="directory in diffusers format, or a hub id")
    parser.add_argument("--revision", help="of a hub id")
    for side in ("height", "width"):
        parser.add_argument(f"--{side}", type=int, default=ModelConfig.model_fields[side].default)
    given = parser.parse_args(arguments)
    model = ModelConfig(path=given.model, revision=given.revision, height=given.height, width=given.width)
    try:
        found = stock_rollout(model)
    except PolicyError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(yaml.safe_dump({"rollout": found}, sort_keys=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
