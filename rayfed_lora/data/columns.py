"""Columns of a raw table: found by name, checked and cast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from rayfed_lora.data import naming
from rayfed_lora.data.delimited import SEPARATORS
from rayfed_lora.data.place import Place
from rayfed_lora.errors import DataError, did_you_mean
from rayfed_lora.recipe.data import Data
from rayfed_lora.recipe.faults import closest

# Models read a few thousand tokens; tokenizing a text of this length takes 160 MB.
MOST_CHARACTERS = 1_000_000
AUTO = "auto"
IMAGE_TASK = "image-classification"
LANGUAGE_TASK = "causal-lm"
# The names that `auto` stands for, by option of the recipe's section `data`.
_USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "text_column": ("text", "sentence", "content", "question"),
    "image_column": ("image", "img", "pixels", "pixel_values"),
    "label_column": ("label", "labels", "target", "class", "coarse_label"),
}


def candidates(data: Data, option: str) -> tuple[str, ...]:
    """Return the column names that an option such as `text_column` stands for, in order."""
    name = getattr(data, option)
    return _USUAL_NAMES[option] if name == AUTO else (name,)


def find(table: pa.Table, data: Data, option: str, where: Place) -> tuple[pa.ChunkedArray, Place]:
    """Return the column that an option such as `text_column` names, as `pick` does."""
    return pick(table, candidates(data, option), option, where)


def pick(
    table: pa.Table, names: Sequence[str], option: str, where: Place
) -> tuple[pa.ChunkedArray, Place]:
    """Return the first of some columns that the table has, and its place, for messages.

    Raises:
        DataError: no such column (the message lists the columns of the table), or several.
    """
    found = next((name for name in names if name in table.column_names), None)
    if found is None:
        got = ", ".join(table.column_names)
        advice = ""
        if set(got.replace(", ", "")) & set(SEPARATORS):
            advice = "; if these are several columns each, set data.format.separator"
        raise DataError(
            f"{where}: need a column {' or '.join(names)}, got the columns {got}; name it in"
            f" `data.{option}`, or all columns of a file without a first line of names in"
            f" data.format.columns{advice}{did_you_mean(closest(names[0], table.column_names))}"
        )
    if table.column_names.count(found) > 1:
        raise DataError(f"{where}: need one column {found!r}, got several")
    return table[found], where.inside(f"column {found!r}")


def reject_nulls(column: pa.ChunkedArray | pa.Array, where: Place) -> None:
    """Raise a DataError that names the first row without a value."""
    if column.null_count > 0:
        row = pc.index(column.is_null(), True).as_py()
        raise DataError(
            f"{where}: need a value in every row, got null in {where.row(row)}"
            f" (the first row is 1; {column.null_count} nulls in all)"
        )


def as_strings(column: pa.ChunkedArray, where: Place) -> pa.ChunkedArray:
    """Return a text column as strings.

    Raises:
        DataError: a type other than text, a null, or a text of more than `MOST_CHARACTERS`.
    """
    plain = naming.plain(column)
    reject_nulls(plain, where)
    if not naming.is_text(plain.type):
        raise DataError(f"{where}: need text, got {column.type}")
    lengths = pc.utf8_length(plain)
    too_long = pc.greater(lengths, MOST_CHARACTERS)
    if pc.any(too_long).as_py():
        row = pc.index(too_long, True).as_py()
        raise DataError(
            f"{where}: need texts of at most {MOST_CHARACTERS:,} characters, got"
            f" {lengths[row].as_py():,} in {where.row(row)} ({pc.sum(too_long)} such rows in all);"
            " shorten or remove them: data.max_length keeps only the first tokens of a text"
        )
    return pc.cast(plain, pa.string())


def as_client_names(column: pa.ChunkedArray, where: Place, typed: bool = True) -> pa.ChunkedArray:
    """Return a column of client names as strings; whole numbers are written in decimal.

    Texts of a source that is not `typed` are read by `naming.csv_names`.

    Raises:
        DataError: values that cannot be names (`naming.as_names`), or a null.
    """
    if not typed and naming.is_text(column.type):
        column = naming.csv_names(column)
    plain = naming.plain(column)
    reject_nulls(plain, where)
    return pc.cast(naming.as_names(plain, where), pa.string())


def as_labels(column: pa.ChunkedArray, where: Place, typed: bool) -> pa.ChunkedArray:
    """Return a label column as int64 or strings (booleans become `false` and `true`).

    Texts of a source that is not `typed` are read by `naming.csv_labels`.

    Raises:
        DataError: values that cannot be names (`naming.as_names`), a whole number of 2^63 or
            more, or a null.
    """
    if not typed and naming.is_text(column.type):
        column = naming.csv_labels(column, where)
    plain = naming.plain(column)
    reject_nulls(plain, where)
    names = naming.as_names(plain, where, naming.NO_CLASSES)
    if not pa.types.is_integer(names.type):
        return names
    try:
        return pc.cast(names, pa.int64())
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: need labels that fit int64, got {error}") from error


def as_numbers(column: pa.ChunkedArray, where: Place) -> pa.ChunkedArray:
    """Return a numeric column as float64.

    Raises:
        DataError: another type, or a null.
    """
    reject_nulls(column, where)
    if not naming.is_number(column.type):
        raise DataError(f"{where}: need numbers, got {column.type}")
    return pc.cast(column, pa.float64(), safe=False)


def as_positive(column: pa.ChunkedArray, where: Place, typed: bool) -> pa.ChunkedArray:
    """Return a column of positive, finite numbers as float64.

    A source that is not `typed` may hold them as texts, if the column names classes or clients too.

    Raises:
        DataError: values of another kind, or a null.
    """
    if not typed and naming.is_text(column.type):
        try:
            column = pc.cast(pc.utf8_trim_whitespace(column), pa.float64())
        except pa.ArrowInvalid as error:
            raise DataError(f"{where}: need numbers, got {error}") from error
    values = as_numbers(column, where)
    wrong = values.filter(pc.invert(pc.and_(pc.is_finite(values), pc.greater(values, 0))))
    if len(wrong) > 0:
        raise DataError(f"{where}: need positive numbers, got {wrong[0].as_py():g}")
    return values
