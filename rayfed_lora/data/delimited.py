"""Tables of delimited text (CSV, TSV): separator, quotes, and rows of wrong length."""

from __future__ import annotations

import re

import pyarrow as pa
from pyarrow import csv

from rayfed_lora.data import text_files
from rayfed_lora.recipe.data import TextFormat

SEPARATORS = ",;\t|"
_RAGGED = re.compile(r"Row #(\d+): Expected (\d+) columns?, got (\d+)")


def read_delimited(
    stream: pa.NativeFile, usual: str, string_columns: list[str], form: TextFormat
) -> pa.Table:
    """Read a table; its first line has the column names, unless `form.columns` has them.

    Args:
        stream: the content, decompressed.
        usual: the separator of files of this name, `,` or a tab.
        string_columns: columns to read as texts, never as numbers or dates.
        form: the options of `data.format`.

    Raises:
        ValueError: content that can be read in several ways, or in none; names the line.
        pa.ArrowException: other content that is no table.
    """
    content = text_files.as_utf8(stream.read(), form.encoding)
    separator = _separator(content, usual, form)
    if form.quote is not None:
        _check_quotes(content, separator, form.quote)
    # Threads would not number the rows in messages.
    reading = csv.ReadOptions(
        use_threads=False, block_size=text_files.BLOCK_BYTES, column_names=form.columns
    )
    parsing = csv.ParseOptions(
        delimiter=separator,
        quote_char=form.quote or False,
        newlines_in_values=form.quote is not None,
    )
    converting = csv.ConvertOptions(
        column_types={name: pa.string() for name in string_columns},
        null_values=[""],  # the words "null" and "NA" are texts
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    try:
        return csv.read_csv(pa.BufferReader(content), reading, parsing, converting)
    except pa.ArrowInvalid as error:
        ragged = _RAGGED.search(str(error))
        if ragged is None:
            raise
        number, expected, got = ragged.groups()
        row = int(number) - (form.columns is None)
        raise ValueError(
            f"{got} values in row {row} (the first row is 1) where the first line has {expected};"
            f" texts with the separator {separator!r} in them need quotes, and data.format names"
            " another separator"
        ) from error


def _separator(content: bytes, usual: str, form: TextFormat) -> str:
    """Return the separator: one that the first line has, if it has not the usual one."""
    if form.separator != text_files.AUTO:
        return "\t" if form.separator == "tab" else form.separator
    lines = content.lstrip(b"\r\n")
    end = re.search(rb"[\r\n]", lines)
    first = lines[: end.start()] if end else lines
    quote = re.escape((form.quote or "").encode())
    bare = (re.sub(rb"%b[^%b]*%b" % (quote, quote, quote), b"", first) if quote else first).decode()
    found = [mark for mark in SEPARATORS if mark in bare]
    if usual in found or not found or usual == "\t":
        return usual
    if len(found) > 1:
        raise ValueError(
            f"a first line with {' and '.join(map(repr, found))} and without {usual!r}; give"
            " data.format.separator"
        )
    return found[0]


def _check_quotes(content: bytes, separator: str, quote: str) -> None:
    """Reject quotes that readers understand differently.

    A quote that starts a value ends it too; quotes inside are doubled. Arrow's reader would join
    the parts of `"a" b`, and the lines up to the next quote.
    """
    q, s = re.escape(quote.encode()), re.escape(separator.encode())
    starts = rb"(?<![^%b\r\n])%b[^%b]*(?:%b%b[^%b]*)*" % (s, q, q, q, q, q)
    quoted = re.compile(rb"%b(%b(?=[%b\r\n]|\Z))?" % (starts, q, s))
    for found in quoted.finditer(content):
        if found[1] is None:
            line = content.count(b"\n", 0, found.start()) + 1
            shown = found[0][:40].decode(errors="replace")
            raise ValueError(
                f"a value in line {line} that starts with a quote and does not end with one:"
                f" {shown!r}; quotes inside quotes are doubled, and data.format.quote: null reads"
                " all quotes as plain characters"
            )
