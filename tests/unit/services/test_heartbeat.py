"""A part that hangs ends itself, says where it hung, and gives its lease away; one that waits does not."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from services.heartbeat import HUNG_EXIT_CODE, Pulse

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


@pytest.mark.parametrize("ordinals", [range(8), [3] * 8])
def test_a_part_that_begins_again_does_not_hang(monkeypatch: pytest.MonkeyPatch, ordinals: list[int]) -> None:
    """Each group has its own time, be it another or the same once more."""
    clock = [0.0]
    monkeypatch.setattr("services.heartbeat.time.monotonic", lambda: clock[0])
    pulse = Pulse("rollout-0", lambda beat: None, hang_s=10)
    for ordinal in ordinals:
        pulse.enter("sampling", ordinal=ordinal)
        clock[0] += 9
        pulse._end_if_hung()
    assert pulse.snapshot().state == "sampling"
