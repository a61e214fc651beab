"""Raw tables from files, URIs and the Hugging Face hub, with clear errors."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from rayfed_lora import storage
from rayfed_lora.endpoints import anonymous
from rayfed_lora.errors import DataError
from rayfed_lora.locations import is_uri

BLOCK_BYTES = 1 << 26  # the longest CSV or JSON record, such as an image written out in numbers
HUB_PREFIX = "hf:"
_MOST_LEVELS = 100
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_OPENING, _CLOSING = list(b"[{"), list(b"]}")


@dataclass(frozen=True)
class RawData:
    """The tables of a source, in its own columns.

    Attributes:
        train: the training rows, or all rows where there is no official test split.
        test: the official test rows, or None.
        class_names: the name of integer label i at place i, or None where labels are the names.
        typed: whether the source declares which columns are texts and which numbers; CSV does not.
    """

    train: pa.Table
    test: pa.Table | None = None
    class_names: tuple[str, ...] | None = None
    typed: bool = True


def read_file(source: str, string_columns: Sequence[str], option: str = "data.source") -> RawData:
    """Read a table from a path or any URI that pyarrow.fs opens, ending in one of `READERS`.

    The CSV columns `string_columns` are read as texts, never as numbers or dates; `option` is the
    recipe's key that names the file, for messages.

    Raises:
        DataError: no such file, or content of another format.
    """
    suffix = suffix_of(source)
    # Endpoints that only the recipe names get no credentials; see `endpoints`.
    how = " (asked without credentials: docs/security.md)" if anonymous(source) else ""
    with (
        _naming_failures(f"{option} {source!r}{how}", f"a readable {suffix} file"),
        _open(source) as stream,
    ):
        table = READERS[suffix](stream, string_columns)
        # Invalid UTF-8 and wrong lengths would otherwise surface far from the file's name.
        _ = table.column_names
        table.validate(full=True)
        return RawData(table, typed=suffix != ".csv")


def read_hub(source: str, label_columns: Sequence[str]) -> RawData:
    """Read the `train` and, if present, the `test` split of `hf:<id>`.

    Labels get the names of the data set's own ClassLabel feature. A test split whose labels are
    all -1, the hub's mark for hidden ones, counts as absent.

    The id is that of a public or cached data set; the first of `label_columns` there is the label.

    Raises:
        DataError: `datasets` is not installed or cannot load the id, or there is no train split.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data.source {source!r}: need the package `datasets`, which is not installed;"
            " pip install 'rayfed-lora[hub]'"
        ) from error
    try:
        splits = datasets.load_dataset(source.removeprefix(HUB_PREFIX))
    except Exception as error:  # the hub's client has no common error
        raise DataError(
            f"data.source {source!r}: need a data set that `datasets` can load, got"
            f" {type(error).__name__}: {_first_line(error)}"
        ) from error
    if "train" not in splits:
        raise DataError(
            f"data.source {source!r}: need a split `train`, got {', '.join(sorted(splits))}"
        )
    train, *tests = (splits[s].with_format("arrow")[:] for s in ("train", "test") if s in splits)
    label = next((name for name in label_columns if name in train.column_names), None)
    test = None if not tests or _has_hidden_labels(tests[0], label) else tests[0]
    names = getattr(splits["train"].features.get(label), "names", None)
    return RawData(train, test, None if names is None else tuple(names))


def _has_hidden_labels(table: pa.Table, label: str | None) -> bool:
    return label in table.column_names and table[label].unique().to_pylist() == [-1]


def suffix_of(source: str) -> str:
    """Return the lower-case extension of a path or URI, with its dot."""
    path = urlsplit(source).path if "://" in source else source
    return PurePosixPath(path).suffix.lower()


@contextmanager
def _naming_failures(what: str, expected: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{what}: need {expected}, there is no such file") from error
    except (OSError, ValueError, OverflowError, RecursionError, pa.ArrowException) as error:
        reason = _first_line(error)
        if "straddling object" in reason:
            reason = f"a row of more than {BLOCK_BYTES:,} bytes"
        raise DataError(f"{what}: need {expected}, got {reason}") from error


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _open(source: str) -> pa.NativeFile:
    filesystem, path = storage.open_filesystem(
        source if is_uri(source) else str(Path(source).expanduser())
    )
    return filesystem.open_input_file(path)


def _read_parquet(stream: pa.NativeFile, string_columns: Sequence[str]) -> pa.Table:
    from pyarrow import parquet

    return parquet.ParquetFile(stream).read()


def _read_csv(stream: pa.NativeFile, string_columns: Sequence[str]) -> pa.Table:
    from pyarrow import csv

    return csv.read_csv(
        stream,
        csv.ReadOptions(block_size=BLOCK_BYTES),
        csv.ParseOptions(newlines_in_values=True),
        csv.ConvertOptions(
            column_types={name: pa.string() for name in string_columns},
            null_values=[""],  # the words "null" and "NA" are texts
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


def _read_json(stream: pa.NativeFile, string_columns: Sequence[str]) -> pa.Table:
    """Read one object a line, or one array of objects."""
    from pyarrow import json as arrow_json

    if stream.read(1) == b"[":
        return _read_json_array(stream)
    stream.seek(0)
    lines = io.BufferedReader(stream, BLOCK_BYTES)
    for line in lines:
        _check_depth(line)
    lines.detach().seek(0)
    options = arrow_json.ReadOptions(block_size=BLOCK_BYTES)
    table = arrow_json.read_json(stream, options)
    # JSON has no dates, but Arrow reads texts that look like dates as timestamps.
    dates = [field.name for field in table.schema if pa.types.is_timestamp(field.type)]
    if not dates:
        return table
    stream.seek(0)
    texts = pa.schema([(name, pa.string()) for name in dates])
    parsing = arrow_json.ParseOptions(texts, unexpected_field_behavior="infer")
    return arrow_json.read_json(stream, options, parsing).select(table.column_names)


def _read_json_array(stream: pa.NativeFile) -> pa.Table:
    import json

    stream.seek(0)
    content = stream.read()
    _check_depth(content)
    rows = json.loads(content)
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("an array of something other than objects")
    return pa.Table.from_pylist(rows)


def _check_depth(content: bytes) -> None:
    """Reject JSON nested so deeply that Arrow's reader would crash the process."""
    if content.count(b"[") + content.count(b"{") <= _MOST_LEVELS:
        return
    characters = np.frombuffer(_STRING.sub(b"", content), np.uint8)
    opened, closed = np.isin(characters, _OPENING), np.isin(characters, _CLOSING)
    depth = int(np.max(np.cumsum(opened.astype(np.int64) - closed), initial=0))
    if depth > _MOST_LEVELS:
        raise ValueError(f"JSON nested in {depth} levels, more than {_MOST_LEVELS}")


def _read_arrow(stream: pa.NativeFile, string_columns: Sequence[str]) -> pa.Table:
    """Read the file format, or the stream format, to which `datasets` gives the same extension."""
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    reader = pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)
    return reader.read_all()


READERS: Mapping[str, Callable[[pa.NativeFile, Sequence[str]], pa.Table]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}
