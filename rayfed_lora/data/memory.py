"""Tables that the caller of a run hands over, in place of a source. Source: this project."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import RawIOBase
from typing import Any

import numpy as np
import pyarrow as pa

from rayfed_lora.data import raw_tables
from rayfed_lora.data.raw_tables import RawData
from rayfed_lora.errors import DataError
from rayfed_lora.locations import each

MEMORY_PREFIX = "memory:"
_EXPECTED = (
    "a pandas DataFrame, a datasets.Dataset or DatasetDict, a pyarrow Table, a list of dicts, or"
    " (train, test) of them"
)


@dataclass(frozen=True)
class Held:
    """Training and test rows, None where they are to be split off, and names of classes."""

    train: pa.Table
    test: pa.Table | None = None
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)


# What this process was handed, by the source that stands for it in recipes.
_HELD: dict[str, Held] = {}


def source_of(data: Any) -> str:
    """Keep data in this process; return the source that stands for them, with their hash.

    Args:
        data: a pandas DataFrame, a `datasets.Dataset` or `DatasetDict` (splits train and test), a
            pyarrow Table, a list of rows as dicts by column, or a pair (train, test) of them.
            Columns as for files.

    Raises:
        DataError: something else, or a column that pyarrow cannot hold.
    """
    held = as_held(data)
    source = MEMORY_PREFIX + digest_of(held)[:32]
    _HELD[source] = held
    return source


def digest_of(held: Held) -> str:
    """Return the SHA-256 of rows and names of classes, however they are cut into chunks."""
    digest = hashlib.sha256()
    for table in (held.train, held.test):
        digest.update(b"table" if table is not None else b"none")
        if table is not None:
            _update(digest, table)
    digest.update(repr(sorted((k, list(v)) for k, v in held.class_names.items())).encode())
    return digest.hexdigest()


def held_for(sources: Iterable[str | Sequence[str] | None]) -> dict[str, Held]:
    """Return the tables that some sources stand for, by source.

    Raises:
        DataError: this process was not handed one of them.
    """
    wanted = [one for source in sources for one in each(source) if one.startswith(MEMORY_PREFIX)]
    return {source: _found(source) for source in wanted}


def restore(held: Mapping[str, Held]) -> None:
    """Keep in this process what another one was handed."""
    _HELD.update(held)


def read_memory(source: str, labels: Sequence[str]) -> RawData:
    """Return the tables that a source stands for; `labels`: names of the label column, in order.

    Raises:
        DataError: this process was not handed them.
    """
    return as_raw(_found(source), labels)


def as_raw(held: Held, labels: Sequence[str]) -> RawData:
    """Return rows as a source gives them; `labels` as for `read_memory`."""
    column = next((name for name in labels if name in held.train.column_names), None)
    names = held.class_names.get(column or "")
    return RawData(held.train, held.test, None if names is None else tuple(names))


def _found(source: str) -> Held:
    held = _HELD.get(source)
    if held is None:
        raise DataError(
            f"data.source {source!r} stands for rows in the memory of the process that made the"
            " recipe; hand them over again: run(..., data=...), with the same rows"
        )
    return held


def as_held(data: Any) -> Held:
    """Return the rows of what `source_of` takes; raises DataError as it does."""
    if isinstance(data, tuple) and len(data) == 2:
        (train, names), (test, _) = map(_table, data)
        return Held(train, test, names)
    if isinstance(data, dict):  # a DatasetDict is one
        unknown = sorted(set(data) - {"train", "test"})
        if "train" not in data or unknown:
            raise DataError(
                f"data: expected the splits train and, where there is one, test, got {list(data)}"
            )
        test = data.get("test")
        return as_held(data["train"] if test is None else (data["train"], test))
    table, names = _table(data)
    return Held(table, None, names)


def _table(data: Any) -> tuple[pa.Table, Mapping[str, Sequence[str]]]:
    """Return rows as a table without pandas' index, and names of classes by column."""
    names: dict[str, Sequence[str]] = {}
    package = type(data).__module__.partition(".")[0]
    try:
        if isinstance(data, list) and all(isinstance(row, dict) for row in data):
            return _table(_frame(data))
        if isinstance(data, pa.Table):
            table = data
        elif package == "pandas" and hasattr(data, "columns"):
            table = pa.Table.from_pandas(_with_lists(data), preserve_index=False)
        elif package == "datasets" and hasattr(data, "features"):
            features = data.features.items()
            names = {c: list(f.names) for c, f in features if getattr(f, "names", None)}
            table = data.with_format("arrow")[:]
        else:
            raise DataError(f"data: expected {_EXPECTED}, got {type(data).__name__}")
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(
            f"data: expected columns of texts, numbers or images: {raw_tables.first_line(error)}"
        ) from error
    if table.num_rows == 0:
        raise DataError("data: expected rows, got none")
    # Dictionaries (pandas' categories) would hash by their order, too.
    plain = [
        column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        for column in table.columns
    ]
    return pa.table(plain, names=table.column_names), names


def _frame(rows: list[dict[str, Any]]) -> Any:
    """Return rows as a DataFrame, whose cells may be arrays."""
    import pandas as pd

    return pd.DataFrame(rows)


def _with_lists(frame: Any) -> Any:
    """Return a DataFrame whose cells are no arrays of several dimensions, which Arrow lacks."""
    lists = {}
    for name, column in frame.items():
        first = column.iloc[0] if len(column) else None
        if isinstance(first, np.ndarray) and first.ndim > 1:
            lists[name] = column.map(lambda cell: np.asarray(cell).tolist())
    return frame.assign(**lists) if lists else frame


class _Hashing(RawIOBase):
    """A file that only hashes what is written to it."""

    def __init__(self, digest: Any) -> None:
        self._digest = digest

    def writable(self) -> bool:
        return True

    def write(self, content: Any, /) -> int:
        self._digest.update(content)
        return len(memoryview(content).cast("B"))


def _update(digest: Any, table: pa.Table) -> None:
    """Hash the rows of a table, however it is cut into chunks."""
    whole = table.replace_schema_metadata(None).combine_chunks()
    with pa.PythonFile(_Hashing(digest), "w") as file, pa.ipc.new_stream(file, whole.schema) as out:
        out.write_table(whole)
