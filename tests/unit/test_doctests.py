"""Every example in a docstring does what it says."""

from __future__ import annotations

import doctest
import importlib
import re

import pytest

from services.config_file import PROJECT_ROOT

PACKAGES = ("services", "policy", "rollout_workers", "reward_servers", "learner", "quickstart", "benchmarks")
SOURCES = {
    ".".join(file.relative_to(PROJECT_ROOT).with_suffix("").parts).removesuffix(".__init__"): text
    for package in PACKAGES
    for file in sorted((PROJECT_ROOT / package).rglob("*.py"))
    if re.search(r"^\s*>>> ", text := file.read_text(encoding="utf-8"), re.MULTILINE)
}
SKIPPED = {"services.embedded", "services.group_queue", "services.telemetry"}
"""Their examples need a server or write into a run."""


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in SKIPPED])
def test_examples(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0 and failed == 0


def test_no_other_example_is_skipped() -> None:
    assert {name for name, text in SOURCES.items() if "doctest: +SKIP" in text} == SKIPPED
