"""A part that hangs ends itself, says where it hung, and gives its lease away; one that waits does not."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from services.heartbeat import HUNG_EXIT_CODE

PART = """
    import logging, sys, threading, time
    from services.heartbeat import Pulse

    logging.basicConfig(level=logging.INFO)
    renewed = []

    def say(beat):
        print("beat", beat.state, flush=True)

    def sample_for_ever():
        threading.Event().wait(120)

    with Pulse("rollout-0", say, renewed.append, every_s=0.05, hang_s=0.3) as pulse:
        pulse.hold(7)
        pulse.enter("{state}", waits={waits})
        if {waits}:
            # Longer than it may hang, by its own count of renewals.
            while len(renewed) < 12:
                time.sleep(0.01)
            print("done", flush=True)
        else:
            sample_for_ever()
"""


def part(state: str, *, waits: bool) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(PART).format(state=state, waits=waits)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


def test_a_part_that_hangs_ends_with_its_stacks() -> None:
    ended = part("sampling", waits=False)
    assert ended.returncode == HUNG_EXIT_CODE
    assert ended.stdout.splitlines()[-1] == "beat hung: sampling"
    assert "rollout-0 hung: sampling for 0.3 s; it ends" in ended.stderr
    assert "MainThread:" in ended.stderr and "in sample_for_ever" in ended.stderr


def test_what_others_are_waited_for_does_not_count() -> None:
    ended = part("waiting for an ordinal", waits=True)
    assert ended.returncode == 0, ended.stderr
    assert "done" in ended.stdout and "hung" not in ended.stdout + ended.stderr


@pytest.mark.parametrize("progress", ["state", "ordinal"])
def test_a_part_that_goes_on_does_not_hang(progress: str) -> None:
    script = textwrap.dedent(PART).format(state="sampling", waits=False)
    goes_on = 'pulse.enter("sampling", ordinal=n)' if progress == "ordinal" else 'pulse.enter(f"step {n}")'
    script = script.replace(
        "        sample_for_ever()",
        f"        for n in range(12):\n            {goes_on}\n            time.sleep(0.05)",
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
