"""What a part is doing, as the title of its process: the Ray dashboard (Cluster, workers of a node), `ps` and
`top` show it.

Promises
- Without ordinals, steps and versions: Ray has a series of metrics for each title.
"""

from __future__ import annotations

import re

from ray._raylet import setproctitle  # type: ignore[attr-defined]  # its stubs leave it out

_NUMBER = re.compile(r"\s*\d[\d.]*")


def show_title(part: str, state: str) -> None:
    """Of this process. Ray names it after each call that it runs, and takes what is here away with that.

    The title of `updating to step 7` of learner-0 is `ray::learner-0: updating to step`.
    """
    setproctitle(f"ray::{part}: {_NUMBER.sub('', state)}")
