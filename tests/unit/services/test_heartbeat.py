"""A part that hangs ends itself, says where it hung, and gives its lease away; one that waits does not."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from learner.ray_train import learner_pulse
from rollout_workers.loop import worker_pulse
from services.config_file import load_config
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


def test_a_part_ends_though_neither_log_nor_queue_takes_its_last_words() -> None:
    script = textwrap.dedent(PART).format(state="sampling", waits=False)
    script = script.replace(
        "renewed = []", "renewed = []\nfrom services import heartbeat\nheartbeat.GOODBYE_S = 0.3"
    )
    script = script.replace(
        'print("beat", beat.state, flush=True)',
        'beat.state.startswith("hung") and threading.Event().wait(120)',
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == HUNG_EXIT_CODE


@pytest.mark.parametrize("part", ["rollout-0", "learner-0"])
def test_workers_and_ranks_end_as_their_settings_say(
    part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, ended = [0.0], list[int]()
    monkeypatch.setattr("services.heartbeat.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("services.heartbeat.os._exit", ended.append)
    config = load_config("quickstart", ["rollout.hang_s=100", "learner.hang_s=300"])
    queue = SimpleNamespace(beat=lambda beat, ttl: None, renew=lambda worker, ordinal: True)
    made = worker_pulse if part == "rollout-0" else learner_pulse
    pulse = made(part, queue, config)  # type: ignore[arg-type]
    pulse.enter("updating")
    for clock[0], over in ((99.0, False), (101.0, part == "rollout-0"), (299.0, None), (301.0, True)):
        pulse._end_if_hung()
        assert over is None or bool(ended) is over
    assert set(ended) == {HUNG_EXIT_CODE} and f"{part} hung: updating" in caplog.text
