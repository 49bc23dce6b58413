"""A recording holds whole groups, whatever ended its recorder; what is damaged is named and never read."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from services.codec import CorruptGroup, Group
from services.config_file import PROJECT_ROOT
from services.queue_types import Frontier
from services.recording import INDEX, Recording, RecordingError
from services.recording_writer import RecordingWriter
from tests.recorded_groups import RUN, config, group, record


def same(found: Group, wanted: Group) -> bool:
    return (
        found.header == wanted.header
        and found.tensors.keys() == wanted.tensors.keys()
        and all(torch.equal(tensor, wanted.tensors[name]) for name, tensor in found.tensors.items())
    )


def ordinals(directory: Path) -> list[int]:
    recording = Recording.open(directory)
    assert all(same(recording.read(place), group(g.ordinal)) for place, g in enumerate(recording.groups))
    return [recorded.ordinal for recorded in recording.groups]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    return record(tmp_path / "recording", [group(ordinal) for ordinal in range(6)])


def test_groups_come_back_as_they_were(recorded: Path) -> None:
    assert ordinals(recorded) == [0, 1, 2, 3, 4, 5]
    facts = Recording.open(recorded).facts
    assert (facts.run, facts.group_size, facts.latent_shape) == (RUN, 4, (4, 8, 16))
    assert (facts.rewards, facts.prompts, facts.trajectory) == (("ocr",), "words", False)


def test_shards_are_one_an_update_and_plain_safetensors(recorded: Path) -> None:
    shards = sorted(recorded.glob("*.safetensors"))
    assert [path.name for path in shards] == [f"shard-{number:06d}.safetensors" for number in range(3)]
    found = safetensors.torch.load_file(shards[1])
    assert sorted(found) == ["2/condition.text", "2/latents", "3/condition.text", "3/latents"]
    assert torch.equal(found["3/latents"], group(3).tensors["latents"])


def test_a_shard_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.recording_writer.SHARD_BYTES", 20_000)
    with RecordingWriter(tmp_path, config(), RUN) as writer:
        writer.append([group(ordinal) for ordinal in range(5)])
    assert [len(safetensors.torch.load_file(path)) for path in sorted(tmp_path.glob("shard*"))] == [4, 4, 2]
    assert ordinals(tmp_path) == [0, 1, 2, 3, 4]


def test_they_are_read_in_the_order_of_their_ordinals(tmp_path: Path) -> None:
    assert ordinals(record(tmp_path, [group(ordinal) for ordinal in (0, 2, 1, 3)])) == [0, 1, 2, 3]


def test_an_index_cut_anywhere_is_a_prefix_and_can_be_gone_on_with(recorded: Path, tmp_path: Path) -> None:
    whole = (recorded / INDEX).read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in sorted({0, 1, *ends, *(end - 1 for end in ends), *(end + 7 for end in ends[:-1])}):
        copy = tmp_path / f"cut-{cut}"
        shutil.copytree(recorded, copy)
        (copy / INDEX).write_bytes(whole[:cut])
        left = list(range(sum(end <= cut for end in ends) - 1))
        if left:
            assert ordinals(copy) == left
        else:
            with pytest.raises(RecordingError, match="holds no group"):
                Recording.open(copy)
        with RecordingWriter(copy, config(), RUN, Frontier(below=len(left))) as writer:
            writer.append([group(ordinal) for ordinal in range(len(left), 7)])
        assert ordinals(copy) == list(range(7))


def test_a_recorder_that_is_killed_leaves_what_it_has_said_to_be_written(tmp_path: Path) -> None:
    program = (
        "import itertools, pathlib, sys\n"
        "from tests.recorded_groups import RUN, RecordingWriter, config, group\n"
        "with RecordingWriter(pathlib.Path(sys.argv[1]), config(), RUN) as writer:\n"
        "    for ordinal in itertools.count(step=2):\n"
        "        writer.append([group(ordinal), group(ordinal + 1)])\n"
        "        print(ordinal, flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT_ROOT) as recorder:
        assert recorder.stdout is not None
        said = [int(recorder.stdout.readline()) for _ in range(20)]
        recorder.send_signal(signal.SIGKILL)
    found = ordinals(tmp_path)
    assert found == list(range(len(found)))
    assert len(found) >= said[-1] + 2


def test_what_a_killed_recorder_left_unnamed_is_cleared_away(recorded: Path) -> None:
    (recorded / "shard-000003.safetensors").write_bytes(b"not in the index yet")
    (recorded / ".shard-000004.safetensors.partial").write_bytes(b"half")
    assert ordinals(recorded) == [0, 1, 2, 3, 4, 5]
    with RecordingWriter(recorded, config(), RUN, Frontier(below=6)) as writer:
        writer.append([group(6)])
    assert ordinals(recorded) == [0, 1, 2, 3, 4, 5, 6]
    assert {path.name for path in recorded.iterdir()} == {
        INDEX,
        *(f"shard-{n:06d}.safetensors" for n in range(4)),
    }


def test_the_lineage_that_survives_wins(recorded: Path) -> None:
    """The learner goes back behind ordinals 0, 1 and 4; 3 was given up meanwhile."""
    frontier = Frontier(below=2, above=(3, 4), dead=(3,))
    again = group(2, version=group(2).header.version.model_copy(update={"epoch": 1}))
    with RecordingWriter(recorded, config(), RUN, frontier) as writer:
        with pytest.raises(ValueError, match=r"ordinals \[1\] are recorded already"):
            writer.append([group(1), again])
        writer.append([again, group(5)])
    recording = Recording.open(recorded)
    assert [found.ordinal for found in recording.groups] == [0, 1, 2, 4, 5]
    assert same(recording.read(2), again)
    assert same(recording.read(3), group(4))


def test_without_a_checkpoint_a_recording_begins_anew(recorded: Path) -> None:
    with RecordingWriter(recorded, config(), RUN) as writer:
        assert [path.name for path in recorded.iterdir()] == [INDEX]
        writer.append([group(0)])
    assert ordinals(recorded) == [0]


def test_two_recorders_at_once_are_refused(recorded: Path) -> None:
    with (
        RecordingWriter(recorded, config(), RUN, Frontier(below=6)),
        pytest.raises(RecordingError, match="another process is writing"),
    ):
        RecordingWriter(recorded, config(), RUN, Frontier(below=6))
    assert ordinals(recorded) == [0, 1, 2, 3, 4, 5]


def test_a_changed_byte_is_named_with_its_shard_and_group(recorded: Path) -> None:
    shard = recorded / "shard-000001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    recording = Recording.open(recorded)
    broken = []
    for place in range(6):
        try:
            recording.read(place)
        except CorruptGroup as error:
            broken.append(str(error))
    (said,) = broken
    assert f"{shard}: sha256" in said
    assert said.startswith(f"group {RUN}-")


def test_a_changed_reward_is_noticed(recorded: Path) -> None:
    index = recorded / INDEX
    score = f"{group(3).header.rewards['ocr'][0]}"
    text = index.read_text()
    assert score in text
    index.write_text(text.replace(score, "0.999"))
    with pytest.raises(CorruptGroup, match=r"group recorded-run-3: .*shard-000001.*tampered"):
        Recording.open(recorded).read(3)


def test_a_group_of_another_run_is_refused(tmp_path: Path) -> None:
    recorded = record(tmp_path, [group(0), group(1, run="another")])
    with pytest.raises(CorruptGroup, match="its header says it is group another-1"):
        Recording.open(recorded).read(1)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            lambda place: (place / "shard-000001.safetensors").unlink(),
            "shard-000001.safetensors: the index names it",
        ),
        (
            lambda place: (place / "shard-000002.safetensors").write_bytes(b"short"),
            r"shard-000002.safetensors: 5 bytes, recorded as \d+: truncated",
        ),
        (
            lambda place: edit(place, '"format":2', '"format":3'),
            "format 3, this version reads formats 1 and 2",
        ),
        (lambda place: edit(place, '"format":2', '"formats":2'), "line 1: says nothing"),
        (lambda place: edit(place, '"seed":0', '"seed":"x"'), "line 1: seed"),
        (lambda place: edit(place, '{"ordinal":2', '{"ordinary":2'), "line 4: not a recorded group"),
        (lambda place: edit(place, '{"ordinal":2', '{"ordinal":1'), "line 4: ordinal 1 is recorded twice"),
        (lambda place: edit(place, "shard-000002", "../shard-000002"), "line 6: no shard can be named"),
        (lambda place: (place / INDEX).unlink(), "not a recording"),
        (shutil.rmtree, "not a recording"),
    ],
)
def test_what_is_no_recording_is_named_when_it_is_opened(
    recorded: Path, damage: Callable[[Path], None], named: str
) -> None:
    damage(recorded)
    with pytest.raises(RecordingError, match=named):
        Recording.open(recorded)


def edit(place: Path, old: str, new: str) -> None:
    index = place / INDEX
    text = index.read_text()
    assert old in text
    index.write_text(text.replace(old, new))
