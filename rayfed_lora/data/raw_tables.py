"""Raw tables from single files on any filesystem, with clear errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa

from rayfed_lora import storage
from rayfed_lora.data import text_files
from rayfed_lora.data.delimited import read_delimited
from rayfed_lora.data.json_rows import read_json
from rayfed_lora.endpoints import anonymous
from rayfed_lora.errors import DataError
from rayfed_lora.locations import is_uri
from rayfed_lora.recipe.data import TextFormat


@dataclass(frozen=True)
class RawData:
    """The tables of a source, in its own columns.

    Attributes:
        train: the training rows, or all rows where there is no official test split.
        test: the official test rows, or None.
        class_names: the name of integer label i at place i, or None where labels are the names.
        typed, test_typed: whether the source declares which columns are texts and which numbers;
            CSV does not.
        files, test_files: name and number of rows of each file, or of what stands for one.
        notes: messages for the user on how the source was read, one line each.
    """

    train: pa.Table
    test: pa.Table | None = None
    class_names: tuple[str, ...] | None = None
    typed: bool = True
    test_typed: bool = True
    files: tuple[tuple[str, int], ...] = ()
    test_files: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()


def read_file(
    source: str,
    string_columns: Sequence[str],
    option: str = "data.source",
    form: TextFormat | None = None,
) -> RawData:
    """Read a table from a path or any URI that pyarrow.fs opens, ending in one of `READERS`.

    The suffix of a compression (`COMPRESSIONS`) may follow. The CSV columns `string_columns` are
    read as texts, never as numbers or dates; `option` is the recipe's key that names the file, for
    messages; `form` are the options of `data.format`.

    Raises:
        DataError: no such file, or content of another format.
    """
    suffix, _ = suffixes_of(source)
    with opened(source, option, f"a readable {suffix} file") as stream:
        table = READERS[suffix](stream, [*string_columns], form or TextFormat())
        # Invalid UTF-8 and wrong lengths would otherwise surface far from the file's name.
        _ = table.column_names
        table.validate(full=True)
        return RawData(table, typed=is_typed(source))


def suffixes_of(source: str) -> tuple[str, str]:
    """Return the lower-case extension of a path or URI, and that of its compression, or "".

    >>> suffixes_of("s3://bucket/rows.CSV.gz?region=eu-central-1"), suffixes_of("rows.parquet")
    (('.csv', '.gz'), ('.parquet', ''))
    """
    path = PurePosixPath(source.partition("?")[0] if is_uri(source) else source)
    last = path.suffix.lower()
    return (path.with_suffix("").suffix.lower(), last) if last in COMPRESSIONS else (last, "")


def is_table(source: str) -> bool:
    """Return whether a name ends as the names of readable tables do."""
    return suffixes_of(source)[0] in READERS


def is_typed(source: str) -> bool:
    """Return whether files of a name declare which columns are texts and which numbers."""
    return suffixes_of(source)[0] not in _UNTYPED


@contextmanager
def opened(source: str, option: str, expected: str) -> Iterator[pa.NativeFile]:
    """Give the content of a file, decompressed; errors name the file and what was expected."""
    # Endpoints that only the recipe names get no credentials; see `endpoints`.
    how = " (asked without credentials: docs/security.md)" if anonymous(source) else ""
    with naming_failures(f"{option} {source!r}{how}", expected):
        filesystem, path = storage.open_filesystem(
            source if is_uri(source) else str(Path(source).expanduser())
        )
        with filesystem.open_input_file(path) as stream:
            _, compression = suffixes_of(source)
            if not compression:
                yield stream
                return
            # Decompressed streams cannot go back.
            packed = pa.CompressedInputStream(stream, COMPRESSIONS[compression])
            yield pa.BufferReader(packed.read())


@contextmanager
def naming_failures(what: str, expected: str) -> Iterator[None]:
    """Turn errors of files and readers into a DataError on what was to be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{what}: need {expected}, there is no such file") from error
    except (OSError, ValueError, OverflowError, RecursionError, pa.ArrowException) as error:
        reason = first_line(error)
        if "straddling object" in reason:
            reason = f"a row of more than {text_files.BLOCK_BYTES:,} bytes"
        raise DataError(f"{what}: need {expected}, got {reason}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_parquet(stream: pa.NativeFile, texts: list[str], form: TextFormat) -> pa.Table:
    from pyarrow import parquet

    return parquet.ParquetFile(stream).read()


def _read_csv(stream: pa.NativeFile, texts: list[str], form: TextFormat) -> pa.Table:
    return read_delimited(stream, ",", texts, form)


def _read_tsv(stream: pa.NativeFile, texts: list[str], form: TextFormat) -> pa.Table:
    return read_delimited(stream, "\t", texts, form)


def _read_json(stream: pa.NativeFile, texts: list[str], form: TextFormat) -> pa.Table:
    return read_json(stream, form.encoding)


def _read_arrow(stream: pa.NativeFile, texts: list[str], form: TextFormat) -> pa.Table:
    """Read the file format, or the stream format, to which `datasets` gives the same extension."""
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    reader = pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)
    return reader.read_all()


READERS: Mapping[str, Callable[[pa.NativeFile, list[str], TextFormat], pa.Table]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}
_UNTYPED = (".csv", ".tsv")
COMPRESSIONS: Mapping[str, str] = {
    ".gz": "gzip",
    ".bz2": "bz2",
    ".zst": "zstd",
    ".lz4": "lz4",
}
