"""Lists of prompts: what an ordinal gets, what is held out, and tables of other people's making."""

from __future__ import annotations

import builtins
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.config import Config
from services.config_file import ConfigError, load_config
from services.messages import Prompt
from services.prompt_lists import ListedPrompts, ReadPrompts, held_out, permuted, read_list
from services.prompts import prompt_source

pyarrow = pytest.importorskip("pyarrow")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def configured(*overrides: str) -> Config:
    return load_config("quickstart", overrides)


def parquet(path: Path, **columns: Any) -> Path:
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@given(st.integers(1, 3000), st.integers(0, 50), st.integers(0, 5))
def test_a_pass_is_a_permutation(size: int, seed: int, turn: int) -> None:
    assert sorted(permuted(seed, turn, size, place) for place in range(size)) == list(range(size))


def test_a_place_of_a_pass_is_the_same_in_every_release() -> None:
    # Resuming a run under a newer release must not change what its ordinals mean.
    places = [permuted(7, 2, 1_000_000_000, place) for place in range(3)]
    assert places == [238334553, 512008383, 311193780]


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(permuted(seed, turn, 50, place) for place in range(50))
        for seed in range(4)
        for turn in range(4)
    }
    assert len(orders) == 16


def test_first_places_are_spread_evenly() -> None:
    """Over many seeds, each of five rows comes first about as often: 2000 draws, 5 standard deviations."""
    counts = Counter(permuted(seed, 0, 5, 0) for seed in range(2000))
    assert all(abs(counts[row] - 400) < 5 * 17.9 for row in range(5))


def test_a_share_is_held_out_by_the_text_alone(tmp_path: Path) -> None:
    texts = [f"prompt number {number}" for number in range(1000)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    (tmp_path / "b.txt").write_text("\n".join(reversed(texts)))
    sources = [
        prompt_source(
            configured("prompts.source=file", f"prompts.path={tmp_path / name}", "prompts.heldout_share=0.2")
        )
        for name in ("a.txt", "b.txt")
    ]
    first, second = ({prompt.text for prompt in source.heldout(99, 1000)} for source in sources)
    assert first == second == {text for text in texts if held_out(text, 0.2)}
    assert 150 < len(first) < 250
    trained = {sources[0].training(0, ordinal).text for ordinal in range(1000 - len(first))}
    assert trained == set(texts) - first
    longest = sources[0].heldout(99, 1000)
    assert sources[0].heldout(99, 10) == longest[:10]


def test_a_larger_share_holds_out_the_same_and_more() -> None:
    texts = [str(number) for number in range(500)]
    small, large = ({text for text in texts if held_out(text, share)} for share in (0.1, 0.3))
    assert small < large


def test_a_list_that_is_held_out_whole_is_refused() -> None:
    prompts = ReadPrompts([Prompt(text="one")])
    with pytest.raises(ConfigError, match="none is left"):
        ListedPrompts(prompts, "here", withheld=frozenset({"one"}))


def test_keys_of_a_jsonl_line_can_be_chosen(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"caption": "a cup", "tag": "colors", "id": 7}) + "\n")
    assert read_list(file, "caption", ["tag"]).prompt(0) == Prompt(text="a cup", metadata={"tag": "colors"})
    with pytest.raises(ConfigError, match=r"line 1: .*'prompt'"):
        read_list(file)


def test_rows_of_a_parquet_file_are_prompts_and_nulls_are_absent(tmp_path: Path) -> None:
    file = parquet(
        tmp_path / "p.parquet",
        prompt=[" a red cup ", "a cup"],
        include=[[{"class": "cup", "color": "red"}], [{"class": "cup", "color": None}]],
        note=[None, "plain"],
    )
    found = read_list(file)
    assert [found.prompt(row) for row in range(2)] == [
        Prompt(text="a red cup", metadata={"include": [{"class": "cup", "color": "red"}]}),
        Prompt(text="a cup", metadata={"include": [{"class": "cup"}], "note": "plain"}),
    ]
    assert list(found.texts()) == ["a red cup", "a cup"]


def test_a_directory_of_parquet_files_is_one_list_in_the_order_of_names(tmp_path: Path) -> None:
    parquet(tmp_path / "d" / "part-1.parquet", prompt=["three"])
    parquet(tmp_path / "d" / "part-0.parquet", prompt=["one", "two"])
    assert list(read_list(tmp_path / "d").texts()) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("columns", "overrides", "says"),
    [
        ({"text": ["a"]}, [], "no column prompt; there are text"),
        ({"prompt": [1]}, [], "holds int64, not text"),
        ({"prompt": ["a", None]}, [], "row 1: the prompt in column 'prompt' is empty"),
        ({"prompt": ["a", " "]}, [], "row 1: .* is empty"),
        ({"prompt": ["a"], "image": [b"x"]}, [], "column 'image' holds binary.*metadata_columns"),
        ({"prompt": ["a"]}, ["prompts.metadata_columns=[tag]"], "no column tag"),
    ],
)
def test_a_table_that_is_not_as_told_is_refused(
    tmp_path: Path, columns: dict[str, Any], overrides: list[str], says: str
) -> None:
    file = parquet(tmp_path / "p.parquet", **columns)
    with pytest.raises(ConfigError, match=says):
        prompt_source(configured("prompts.source=file", f"prompts.path={file}", *overrides))


def test_a_column_of_images_does_no_harm_where_others_are_chosen(tmp_path: Path) -> None:
    file = parquet(tmp_path / "p.parquet", prompt=["a"], image=[b"x"], tag=["t"])
    assert read_list(file, metadata_columns=["tag"]).prompt(0).metadata == {"tag": "t"}


def test_a_number_that_json_lacks_is_refused_with_its_row(tmp_path: Path) -> None:
    file = parquet(tmp_path / "p.parquet", prompt=["a", "b"], weight=[1.0, float("nan")])
    assert read_list(file).prompt(0).metadata == {"weight": 1.0}
    with pytest.raises(ConfigError, match="row 1: nan"):
        read_list(file).prompt(1)


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = parquet(tmp_path / "p.parquet", prompt=["a"])
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("pyarrow", "datasets"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", lambda name: without(name))
    with pytest.raises(ConfigError, match=r"extra `datasets` \(pip install 'dgpo-cluster\[datasets\]'\)"):
        read_list(file)


def test_a_dataset_is_read_by_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    place = tmp_path / "captions"
    parquet(place / "train.parquet", caption=["one", "two", "three"], tag=["a", "b", "c"])
    parquet(place / "test.parquet", caption=["four"], tag=["d"])
    source = prompt_source(
        configured(
            "prompts.source=dataset",
            f"prompts.dataset={place}",
            "prompts.text_column=caption",
            "prompts.heldout_split=test",
        )
    )
    assert {source.training(0, ordinal).text for ordinal in range(3)} == {"one", "two", "three"}
    assert source.heldout(99, 5) == [Prompt(text="four", metadata={"tag": "d"})]
    with pytest.raises(ConfigError, match="split valid: cannot be loaded"):
        prompt_source(
            configured(
                "prompts.source=dataset",
                f"prompts.dataset={place}",
                "prompts.text_column=caption",
                "prompts.split=valid",
            )
        )


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["prompts.source=dataset"], "needs the name of one"),
        (["prompts.source=dataset", "prompts.dataset=org/name"], "40 hexadecimal digits"),
        (["prompts.source=dataset", "prompts.dataset=org/name", "prompts.revision=main"], "found 'main'"),
        (["prompts.source=dataset", "prompts.dataset=./here", "prompts.revision=main"], "is a directory"),
        (
            ["prompts.source=dataset", "prompts.dataset=o/n", f"prompts.revision='{COMMIT}'",
             "prompts.heldout_split=train"],
            "is the split that is trained on",
        ),
        (["prompts.source=words", "prompts.heldout_share=0.1"], "leave heldout_share out"),
        (["prompts.source=file", "prompts.path=p.txt", "prompts.split=test"], "split would do nothing"),
        (["prompts.source=file", "prompts.path=p.txt", "prompts.text_column=t"], "has no columns"),
        (
            ["prompts.source=file", "prompts.path=p.txt", "prompts.heldout_share=0.1", "eval.path=h.txt"],
            r"eval.path and prompts.heldout_share",
        ),
        (["prompts.source=mix"], "need each other"),
        (["prompts={source: recorded, path: d, curriculum: {after: 2}}"], "samples nothing"),
    ],
)  # fmt: skip
def test_settings_without_effect_or_sense_are_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        configured(*overrides)
