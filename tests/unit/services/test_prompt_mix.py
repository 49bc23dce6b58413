"""Several sources by weight: shares, whole passes, orders of their own, and nothing held out is trained."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.config_file import ConfigError, load_config
from services.prompt_mix import BLOCK, MixedPrompts
from services.prompts import PromptSource, prompt_source


def mixed(*sources: dict[str, Any], overrides: tuple[str, ...] = ()) -> PromptSource:
    text = yaml.safe_dump({"source": "mix", "mix": list(sources)}, default_flow_style=True, width=10**6)
    return prompt_source(load_config("quickstart", [f"prompts={text}", *overrides]))


def listed(folder: Path, name: str, count: int, **settings: Any) -> dict[str, Any]:
    file = folder / f"{name}.txt"
    file.write_text("\n".join(f"{name} {number}" for number in range(count)))
    return {"name": name, "source": "file", "path": str(file), **settings}


def test_sources_are_drawn_by_weight_and_each_list_is_passed_through_whole(tmp_path: Path) -> None:
    source = mixed(listed(tmp_path, "a", 40, weight=3), listed(tmp_path, "b", 30))
    texts = [source.training(0, ordinal).text for ordinal in range(4000)]
    counts = Counter(text.split()[0] for text in texts)
    assert abs(counts["a"] - 3000) < 5 * 27.4  # five standard deviations of the binomial
    for name, size in (("a", 40), ("b", 30)):
        own = [text for text in texts if text.startswith(name)]
        for turn in range(len(own) // size):
            assert len(set(own[turn * size : (turn + 1) * size])) == size


def test_an_ordinal_needs_none_before_it(tmp_path: Path) -> None:
    sources = listed(tmp_path, "a", 40), {"name": "words", "source": "words"}
    in_order = mixed(*sources)
    told = [in_order.training(3, ordinal) for ordinal in range(2 * BLOCK + 5)]
    for ordinal in (2 * BLOCK + 4, 0, BLOCK, BLOCK - 1):
        assert mixed(*sources).training(3, ordinal) == told[ordinal]
    assert isinstance(in_order, MixedPrompts)
    assert in_order.training(4, 7) != told[7]


def test_the_order_of_a_source_is_its_own(tmp_path: Path) -> None:
    a, b, c = (listed(tmp_path, name, 40) for name in "abc")

    def order(*sources: dict[str, Any]) -> list[str]:
        source = mixed(*sources)
        texts = [source.training(0, ordinal).text for ordinal in range(400)]
        return [text for text in texts if text.startswith("a")][:40]

    assert order(a, b) == order({**a, "weight": 2}, c, b)


def test_what_one_source_holds_out_is_trained_from_none(tmp_path: Path) -> None:
    same = tmp_path / "same.txt"
    same.write_text("\n".join(f"prompt {number}" for number in range(200)))
    first = {"name": "first", "source": "file", "path": str(same), "heldout_share": 0.2}
    source = mixed(first, {"name": "second", "source": "file", "path": str(same)})
    heldout = {prompt.text for prompt in source.heldout(99, 1000)}
    assert 20 < len(heldout) < 70
    assert heldout.isdisjoint(source.training(0, ordinal).text for ordinal in range(2000))


def test_held_out_prompts_come_from_each_source_in_turn(tmp_path: Path) -> None:
    (tmp_path / "h.txt").write_text("held one\nheld two\n")
    source = mixed(
        listed(tmp_path, "a", 5, heldout_path=str(tmp_path / "h.txt")), {"name": "words", "source": "words"}
    )
    longest = source.heldout(99, 10)
    assert [prompt.text.startswith("held") for prompt in longest] == [True, False, True] + [False] * 7
    for count in range(10):
        assert source.heldout(99, count) == longest[:count]


def test_one_file_may_hold_out_for_all(tmp_path: Path) -> None:
    (tmp_path / "h.txt").write_text("held\n")
    a, b = listed(tmp_path, "a", 5), listed(tmp_path, "b", 5)
    source = mixed(a, b, overrides=(f"eval.path={tmp_path / 'h.txt'}",))
    assert [prompt.text for prompt in source.heldout(99, 5)] == ["held"]
    (tmp_path / "h.txt").write_text("b 3\n")
    with pytest.raises(ConfigError, match=r"source 'b': .*'b 3'"):
        mixed(a, b, overrides=(f"eval.path={tmp_path / 'h.txt'}",))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"name": "a", "source": "recorded", "path": "d"}, "cannot have a source 'recorded'"),
        ({"name": "a", "source": "words", "heldout_path": "h.txt"}, "leave heldout_path out"),
        ({"name": "a", "source": "file", "path": "p.txt", "heldout_path": "h", "heldout_share": 0.1},
         "give one"),
        ({"name": "words", "source": "words"}, "names must differ"),
        ({"name": "a", "source": "words", "weight": 0}, "greater than 0"),
    ],
)  # fmt: skip
def test_a_mix_that_cannot_be_is_refused(source: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        mixed({"name": "words", "source": "words"}, source)
