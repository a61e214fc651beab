"""Tables of JSON: one object a line, or one array of objects."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pyarrow as pa
from pyarrow import json as arrow_json

from rayfed_lora.data import text_files

_MOST_LEVELS = 100
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_OPENING, _CLOSING = list(b"[{"), list(b"]}")


def read_json(stream: pa.NativeFile, encoding: str) -> pa.Table:
    """Read a table of JSON text in an encoding, or `auto`.

    Raises:
        ValueError: content that is no table of objects; names the line.
        pa.ArrowException: the same.
    """
    head = stream.read(64)
    text_files.reject_other_kinds(head)
    stream.seek(0)
    if encoding != text_files.AUTO or not head.isascii() or b"\0" in head:
        stream = pa.BufferReader(text_files.as_utf8(stream.read(), encoding))
        head = stream.read(64)
        stream.seek(0)
    if head.lstrip().startswith(b"["):
        return _read_array(stream)
    lines = io.BufferedReader(stream, text_files.BLOCK_BYTES)
    for number, line in enumerate(lines, 1):
        _check_depth(line)
        if not line.isascii():
            text_files.as_utf8(line, text_files.AUTO, number)
    lines.detach().seek(0)
    options = arrow_json.ReadOptions(block_size=text_files.BLOCK_BYTES)
    table = arrow_json.read_json(stream, options)
    if table.num_rows == 1 and any(pa.types.is_nested(kind) for kind in table.schema.types):
        raise ValueError(
            f"one object with {', '.join(table.column_names[:5])}; need an object for each row, one"
            " a line or all in one array (pandas: to_json(orient='records'))"
        )
    # JSON has no dates, but Arrow reads texts that look like dates as timestamps.
    texts = pa.schema(
        [(f.name, _with_texts(f.type)) for f in table.schema if _with_texts(f.type) != f.type]
    )
    if not texts.names:
        return table
    stream.seek(0)
    parsing = arrow_json.ParseOptions(texts, unexpected_field_behavior="infer")
    return arrow_json.read_json(stream, options, parsing).select(table.column_names)


def _with_texts(kind: pa.DataType) -> pa.DataType:
    """Return a type with texts in place of timestamps, also inside of lists and objects."""
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_with_texts(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _with_texts(field.type)) for field in kind.fields])
    return kind


def _read_array(stream: pa.NativeFile) -> pa.Table:
    content = stream.read()
    _check_depth(content)
    rows = json.loads(text_files.as_utf8(content, text_files.AUTO))
    odd = next((i for i, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if odd is not None:
        raise ValueError(f"an array of something other than objects, in row {odd}")
    # Rows may lack keys that others have.
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def _check_depth(content: bytes) -> None:
    """Reject JSON nested so deeply that Arrow's reader would crash the process."""
    if content.count(b"[") + content.count(b"{") <= _MOST_LEVELS:
        return
    characters = np.frombuffer(_STRING.sub(b"", content), np.uint8)
    opened, closed = np.isin(characters, _OPENING), np.isin(characters, _CLOSING)
    depth = int(np.max(np.cumsum(opened.astype(np.int64) - closed), initial=0))
    if depth > _MOST_LEVELS:
        raise ValueError(f"JSON nested in {depth} levels, more than {_MOST_LEVELS}")
