"""Images in files of their own: folders of classes, and tables of image paths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc

from rayfed_lora.data import naming, raw_tables
from rayfed_lora.errors import DataError
from rayfed_lora.locations import child, is_uri, parent

_THREADS = 16


def read_images(files: Sequence[str], labels: Sequence[str], option: str) -> pa.Table:
    """Return columns `image` (encoded, from the files) and `label`.

    Raises:
        DataError: an image cannot be read.
    """
    contents = pa.array(_read(files, [option] * len(files)), pa.large_binary())
    return pa.table({"image": contents, "label": pa.array(labels, pa.string())})


def with_contents(
    table: pa.Table, names: Sequence[str], location: str | None, option: str
) -> pa.Table:
    """Return a table whose image column has the images' bytes where it had their paths.

    The column is the first of `names` there: of texts, or of structs whose `bytes` may be null. A
    path is relative to the folder of the table, `location`.

    Raises:
        DataError: a path leads to no file, or out of the folder of a URI; names the row.
    """
    name = next((name for name in names if name in table.column_names), None)
    if name is None or table.column_names.count(name) > 1:
        return table
    column = naming.plain(table[name])
    kind, inside = column.type, None
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:
        inside, column = pc.struct_field(column, "bytes"), pc.struct_field(column, "path")
        if inside.null_count == 0:
            return table
    elif not naming.is_text(kind):
        return table
    paths = column.to_pylist()
    known = [None] * len(paths) if inside is None else inside.to_pylist()
    where = f"{option} {location!r}, column {name!r}"
    wanted = [i for i, path in enumerate(paths) if known[i] is None and path is not None]
    files = [_in_folder_of(location, paths[i], f"{where}, row {i + 1}") for i in wanted]
    rows = [f"{where}, row {i + 1}: file" for i in wanted]
    for i, content in zip(wanted, _read(files, rows), strict=True):
        known[i] = content
    encoded = pa.array(known, pa.large_binary())
    return table.set_column(table.column_names.index(name), name, encoded)


def _in_folder_of(location: str | None, path: str, where: str) -> str:
    """Return the location of an image whose path is relative to a table's folder."""
    if is_uri(path):
        raise DataError(
            f"{where}: need the path of a file, got {path!r}; download the images, and write their"
            " paths relative to the table"
        )
    if location is None or not is_uri(location):
        return os.path.join(os.path.dirname(os.path.expanduser(location or "")), path)
    try:
        return child(parent(location)[0], *path.split("/"))
    except ValueError as error:
        raise DataError(f"{where}: need a path inside the table's folder, {error}") from error


def _read(files: Sequence[str], where: Sequence[str]) -> list[bytes]:
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(_read_one, files, where))


def _read_one(file: str, where: str) -> bytes:
    with raw_tables.opened(file, where, "an image file") as stream:
        content: bytes = stream.read()
        return content
