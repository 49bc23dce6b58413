"""Prompts by the name of a dataset on the hub, from a hub on loopback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILE = "train.jsonl"
ROWS = "".join(json.dumps({"caption": f"a sign {number}", "kind": "sign"}) + "\n" for number in range(20))
READ = """
import sys
from services.config_file import load_config
from services.prompts import prompt_source

source = prompt_source(load_config("quickstart", sys.argv[1:]))
first = source.training(0, 0)
heldout = source.heldout(0, 99)
print("read:", len(heldout), first.text, first.metadata)
"""


class Hub(BaseHTTPRequestHandler):
    """One dataset of one file, at one commit."""

    def log_message(self, *ignored: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, *, body: bool = True) -> None:
        place = self.path.partition("?")[0]
        file = {"type": "file", "path": FILE, "size": len(ROWS), "oid": "0" * 40}
        if place == f"/datasets/org/signs/resolve/{COMMIT}/{FILE}":
            self._answer(200, ROWS, body, ETag=f'"{"0" * 40}"')
        elif place == f"/api/datasets/org/signs/tree/{COMMIT}":
            self._answer(200, json.dumps([file]), body)
        elif place == f"/api/datasets/org/signs/revision/{COMMIT}":
            about = {"id": "org/signs", "sha": COMMIT, "siblings": [{"rfilename": FILE}]}
            self._answer(200, json.dumps(about), body)
        else:
            self._answer(404, "{}", body, **{"X-Error-Code": "EntryNotFound"})

    def _answer(self, code: int, text: str, body: bool, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(text)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(text.encode())


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_dataset_of_the_hub_is_read_at_its_commit(hub: str, tmp_path: Path) -> None:
    """In a process of its own: the library reads where the hub is when it is imported."""
    columns = "text_column: caption, metadata_columns: [kind], heldout_share: 0.2"
    setting = f"prompts={{source: dataset, dataset: org/signs, revision: '{COMMIT}', {columns}}}"
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    found = subprocess.run(
        [sys.executable, "-c", READ, setting], env=environment, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert re.fullmatch(r"read: [1-9] a sign \d+ \{'kind': 'sign'\}", found.stdout.splitlines()[-1])
