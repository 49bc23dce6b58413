"""How a command of ours ends: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted."""

from __future__ import annotations

import logging
import sys

import typer
from rich.console import Console
from rich.text import Text

from services.config_file import ConfigError
from services.full_disk import disk_refuses
from services.stop_signals import INTERRUPTED, Interrupted

logger = logging.getLogger(__name__)
# The traceback is for a log file; where none is configured, Python's last resort would print it.
logger.addHandler(logging.NullHandler())

FAILED = 1
WRONG_USAGE = 2


def run(app: typer.Typer) -> None:
    """Run a typer application; an exception becomes one readable line and the right exit code.

    The traceback goes to the driver's log, where there is one.
    """
    screen = Console(stderr=True)
    try:
        app()
    except (KeyboardInterrupt, Interrupted) as stopped:
        screen.print(Text(str(stopped) or "interrupted"), soft_wrap=True)
        sys.exit(INTERRUPTED)
    except ConfigError as error:
        screen.print(Text("configuration: ", style="red") + Text(str(error)), soft_wrap=True)
        sys.exit(WRONG_USAGE)
    except Exception as error:
        logger.exception("failed")
        what = disk_refuses(error) or f"{type(error).__name__}: {error}"
        screen.print(Text("failed: ", style="red") + Text(what), soft_wrap=True)
        sys.exit(FAILED)
