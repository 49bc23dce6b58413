"""Prompts of parquet files and Hugging Face datasets, as Arrow tables.

Promises
- A table that is not as the configuration says is refused before anything is started: a missing column, a
  column that JSON has no word for, a row without a text.
- Rows become Python values one at a time: a dataset of millions stays where the library keeps it.

Needs the extra `datasets`; without it the error says so.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from services.config_file import ConfigError, find
from services.messages import Prompt
from services.prompt_lists import PromptList


def read_parquet(path: Path, text_column: str, metadata_columns: Sequence[str] | None) -> PromptList:
    """The prompts of a file, or of a directory of them in the order of their names.

    Raises:
        ConfigError: they cannot be read, or are not as described.
    """
    arrow = _needs_extra("pyarrow", f"prompts {path}")
    parquet = _needs_extra("pyarrow.parquet", f"prompts {path}")
    try:
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise OSError("the directory holds no .parquet file")
        names = parquet.read_schema(files[0]).names
        columns = [name for name in names if _wanted(name, text_column, metadata_columns)]
        table = arrow.concat_tables([parquet.ParquetFile(file).read(columns=columns) for file in files])
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise ConfigError(f"prompts {path}: cannot be read: {error}") from error
    return ArrowPrompts(table, str(path), text_column, metadata_columns)


def read_dataset(
    name: str,
    split: str,
    *,
    subset: str | None = None,
    revision: str | None = None,
    text_column: str = "prompt",
    metadata_columns: Sequence[str] | None = None,
) -> PromptList:
    """The prompts of a split of a dataset, which the `datasets` library keeps in its own cache.

    Raises:
        ConfigError: the library or the dataset cannot be had, or it is not as described.
    """
    where = f"dataset {name}, split {split}"
    datasets = _needs_extra("datasets", where)
    try:
        place = str(find(name)) if name.startswith(("/", ".")) else name
        loaded = datasets.load_dataset(place, subset, split=split, revision=revision)
        names = [name for name in loaded.column_names if _wanted(name, text_column, metadata_columns)]
        # Memory-mapped, and free of what the decoders (of images, say) would make of it.
        table = loaded.select_columns(names).with_format("arrow")[:]
    except Exception as error:  # the library's errors are of many kinds, and some of its own
        raise ConfigError(f"{where}: cannot be loaded: {error}") from error
    return ArrowPrompts(table, where, text_column, metadata_columns)


def _wanted(name: str, text_column: str, metadata_columns: Sequence[str] | None) -> bool:
    return metadata_columns is None or name == text_column or name in metadata_columns


def _needs_extra(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{what}: needs the package {module.partition('.')[0]}: install the extra `datasets` "
            f"(pip install 'dgpo-cluster[datasets]'): {error}"
        ) from error


class ArrowPrompts:
    """Prompts of an Arrow table; rows become Python values one at a time.

    A null among the metadata counts as absent: tables have all their columns in every row.

    Raises:
        ConfigError: a column is missing or not of a kind that JSON has, or a row has no text.
    """

    def __init__(
        self, table: Any, where: str, text_column: str, metadata_columns: Sequence[str] | None
    ) -> None:
        import pyarrow
        from pyarrow import compute

        names = list(table.column_names)
        chosen = [name for name in names if name != text_column]
        if metadata_columns is not None:
            chosen = list(metadata_columns)
        missing = [name for name in (text_column, *chosen) if name not in names]
        if missing:
            raise ConfigError(f"{where}: no column {', '.join(missing)}; there are {', '.join(names)}")
        kind = table.schema.field(text_column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise ConfigError(f"{where}: text_column {text_column!r} holds {kind}, not text")
        strange = [name for name in chosen if not _json_kind(table.schema.field(name).type)]
        if strange:
            raise ConfigError(
                f"{where}: column {strange[0]!r} holds {table.schema.field(strange[0]).type}, which JSON has "
                "no word for and no reward server can be sent: name those that shall go in metadata_columns"
            )
        if not len(table):
            raise ConfigError(f"{where}: holds no prompt")
        trimmed = compute.fill_null(compute.utf8_trim_whitespace(table.column(text_column)), "")
        empty = compute.index(trimmed, "").as_py()
        if empty >= 0:
            raise ConfigError(f"{where}, row {empty}: the prompt in column {text_column!r} is empty")
        self._where, self._texts = where, trimmed
        self._columns = {name: table.column(name) for name in chosen}

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self) -> Iterator[str]:
        return (text.as_py() for text in self._texts)

    def prompt(self, row: int) -> Prompt:
        found = {name: column[row].as_py() for name, column in self._columns.items()}
        try:
            metadata = {name: _plain(value) for name, value in found.items() if value is not None}
        except ValueError as error:
            raise ConfigError(f"{self._where}, row {row}: {error}") from error
        return Prompt(text=self._texts[row].as_py(), metadata=metadata)


def _json_kind(kind: Any) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _json_kind(kind.value_type)
    if types.is_struct(kind):
        return all(_json_kind(field.type) for field in kind)
    simple = (
        *(types.is_string, types.is_large_string, types.is_boolean),
        *(types.is_integer, types.is_floating, types.is_null),
    )
    return any(check(kind) for check in simple)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no JSON number")
    return value
