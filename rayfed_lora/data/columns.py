"""Find the columns of a raw table and bring labels, texts and client names into one form.

Source: this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayfed_lora.data import naming
from rayfed_lora.errors import DataError

# A model reads some thousands of tokens; of a text of this size tokenizers take 160 MB.
MOST_CHARACTERS = 1_000_000
AUTO = "auto"
TEXT_COLUMNS = ("text", "sentence", "content", "question")
IMAGE_COLUMNS = ("image", "img", "pixels", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "target", "class", "coarse_label")


@dataclass(frozen=True)
class Classes:
    """The classes in the order of their numbers.

    Attributes:
        values: the labels as the source writes them, strings or integers.
        names: what to call them.
    """

    values: tuple[int | str, ...]
    names: tuple[str, ...]


def names_of(wanted: str, candidates: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that a column option stands for: `candidates` where it is `auto`."""
    return candidates if wanted == AUTO else (wanted,)


def pick(table: pa.Table, names: Sequence[str], option: str, source: str) -> str:
    """Return the first of `names` that is a column.

    Args:
        table: the raw table.
        names: names to look for, in this order.
        option: the recipe's option under `data` that names this column, for the message.
        source: the recipe's `data.source`, for the message.

    Raises:
        DataError: there is no such column (lists those there are), or several.
    """
    found = next((name for name in names if name in table.column_names), None)
    if found is None:
        raise DataError(
            f"data.source {source!r}: need a column {' or '.join(names)}, got the columns"
            f" {', '.join(table.column_names)}; name it in `data.{option}`"
        )
    if table.column_names.count(found) > 1:
        raise DataError(f"data.source {source!r}: need one column {found!r}, got several")
    return found


def reject_nulls(column: pa.ChunkedArray | pa.Array, where: str) -> None:
    """Raise a DataError that names the first row without a value, if there is one."""
    if column.null_count > 0:
        row = int(np.flatnonzero(pc.is_null(column).to_numpy(zero_copy_only=False))[0])
        raise DataError(
            f"{where}: need a value in every row, got null in row {row + 1}"
            f" (the first row is 1; {column.null_count} nulls in all)"
        )


def as_strings(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Return a text column as plain strings.

    Raises:
        DataError: it holds something other than text, a null, or a text of more than
            `MOST_CHARACTERS`.
    """
    found = naming.plain(column)
    reject_nulls(found, where)
    if not naming.is_text(found.type):
        raise DataError(f"{where}: need text, got {column.type}")
    _reject_long(found, where)
    return pc.cast(found, pa.string())


def _reject_long(texts: pa.ChunkedArray, where: str) -> None:
    """Raise a DataError that names the first text too long to be tokenised in bounded memory."""
    signs = pc.utf8_length(texts)
    long = np.flatnonzero(pc.greater(signs, MOST_CHARACTERS).to_numpy())
    if len(long) > 0:
        row = int(long[0])
        raise DataError(
            f"{where}: need texts of at most {MOST_CHARACTERS:,} characters, got"
            f" {signs[row].as_py():,} in row {row + 1} ({len(long)} such rows in all); cut them, or"
            " leave them out: data.max_length keeps only the first tokens of a text"
        )


def as_client_names(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Return the column that names the clients as strings; whole numbers are written out.

    Raises:
        DataError: it holds something that is no name (`naming.as_names`), or a null.
    """
    found = naming.plain(column)
    reject_nulls(found, where)
    return pc.cast(naming.as_names(found, where), pa.string())


def as_numbers(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Return a column of texts as float64.

    Raises:
        DataError: one is no number.
    """
    try:
        return pc.cast(pc.utf8_trim_whitespace(column), pa.float64())
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: need numbers, got {error}") from error


def as_positive(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Return a column of numbers as float64.

    Raises:
        DataError: it holds something other than positive numbers, or a null.
    """
    reject_nulls(column, where)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise DataError(f"{where}: need numbers, got {column.type}")
    values = pc.cast(column, pa.float64(), safe=False)
    wrong = values.filter(pc.invert(pc.and_(pc.is_finite(values), pc.greater(values, 0))))
    if len(wrong) > 0:
        raise DataError(f"{where}: need positive numbers, got {wrong[0].as_py():g}")
    return values


def as_labels(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Return a label column as int64 or strings (booleans become `false` and `true`).

    Raises:
        DataError: it holds something that is no name (`naming.as_names`), a whole number of 2^63 or
            more, or a null.
    """
    found = naming.plain(column)
    reject_nulls(found, where)
    names = naming.as_names(found, where, naming.NO_CLASSES)
    if not pa.types.is_integer(names.type):
        return names
    try:
        return pc.cast(names, pa.int64())
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: need labels that fit int64, got {error}") from error


def find_classes(
    labels: pa.ChunkedArray,
    wanted: Sequence[int | str] | None,
    class_names: Sequence[str] | None,
    where: str,
) -> Classes:
    """Number the labels: sorted, or as `wanted` lists them.

    Args:
        labels: what `as_labels` returned.
        wanted: the labels to keep; each may be written as an integer, a string or a class name.
        class_names: the name of integer label i at place i, or None.
        where: source and column, for messages.

    Raises:
        DataError: a wanted label is not there or given twice, or fewer than two classes are left.
    """
    values: list[int | str] = sorted(labels.unique().to_pylist())
    names = [_name(value, class_names) for value in values]
    if wanted is not None:
        chosen = [_position(label, values, names, where) for label in wanted]
        if len(set(chosen)) < len(chosen):
            raise DataError(f"{where}: need every one of data.labels once, got {list(wanted)}")
        values, names = [values[i] for i in chosen], [names[i] for i in chosen]
    if len(values) < 2:
        raise DataError(f"{where}: need at least 2 classes, got {len(values)}: {values}")
    return Classes(tuple(values), tuple(names))


def notes_on(classes: Classes, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """Return what the user should know of the classes that were found.

    Args:
        classes: from `find_classes`.
        class_names: as for `find_classes`.
    """
    found = [naming.alike(classes.names, "labels")]
    if class_names is not None:
        nameless = [
            str(v) for v in classes.values if isinstance(v, int) and not 0 <= v < len(class_names)
        ]
        if nameless:
            found.append(
                f"labels {', '.join(nameless)} have no name in the data set and are classes too;"
                " list those to keep in data.labels"
            )
    return tuple(note for note in found if note is not None)


def number(labels: pa.ChunkedArray, classes: Classes) -> pa.ChunkedArray:
    """Return int64 class numbers, null where the label is none of the classes."""
    known = pa.array(classes.values)
    if known.type != labels.type:
        return pa.chunked_array([pa.nulls(len(labels), pa.int64())])
    return pc.cast(pc.index_in(labels, value_set=known), pa.int64())


def _name(value: int | str, class_names: Sequence[str] | None) -> str:
    if class_names is not None and isinstance(value, int) and 0 <= value < len(class_names):
        return class_names[value]
    return str(value)


def _position(
    label: int | str, values: Sequence[int | str], names: Sequence[str], where: str
) -> int:
    written = [str(value) for value in values]
    for spellings in (written, names):
        if str(label) in spellings:
            return spellings.index(str(label))
    raise DataError(
        f"{where}: need data.labels that are there, got {label!r}; there are {', '.join(written)}"
    )
