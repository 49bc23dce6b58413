"""Loading prints nothing that a user cannot act on; in a process of its own: libraries warn once in each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMIT = "1" * 40
LOADING = """
from pathlib import Path
from policy import load_policy
from services.evaluate import to_evaluate
small = ("model.height=32", "model.width=64", "model.max_sequence_length=1", "model.device=cpu")
config = to_evaluate(Path("acme/tiny"), "quickstart", small, revision={revision!r}).config
load_policy(config.model, text_encoders=True, vae=True)
"""


@pytest.mark.parametrize("revision", [COMMIT, None])
def test_a_model_of_the_hub_is_loaded_without_a_word(
    tiny_sd3: Path, tmp_path: Path, revision: str | None
) -> None:
    repository = tmp_path / "cache" / "models--acme--tiny"
    shutil.copytree(tiny_sd3, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    done = subprocess.run(
        [sys.executable, "-c", LOADING.format(revision=revision)],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    said = (done.stdout + done.stderr).splitlines()
    if revision is None:
        # That a branch may have gone on since is worth knowing.
        assert any("acme/tiny" in line for line in said)
        said = [line for line in said if "acme/tiny" not in line]
    assert said == []
