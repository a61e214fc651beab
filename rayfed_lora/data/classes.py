"""The classes of a data set: found among its labels, named and numbered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from rayfed_lora.data import naming
from rayfed_lora.errors import DataError

# So many rows without two of the same class have no classes, but numbers or names of their own.
_MANY = 20


@dataclass(frozen=True)
class Classes:
    """The classes in the order of their numbers: labels as the source has them, display names."""

    values: tuple[int | str, ...]
    names: tuple[str, ...]


def find_classes(
    labels: pa.ChunkedArray,
    wanted: Sequence[int | str] | None,
    class_names: Sequence[str] | None,
    where: str,
) -> Classes:
    """Return the classes among the labels: sorted, or as `wanted` lists them.

    `labels` come from `columns.as_labels`. Each of `wanted` may be written as an integer, a string
    or a class name; `class_names` has the name of integer label i at place i.

    Raises:
        DataError: a wanted label is missing or listed twice, or fewer than two classes are left.
    """
    values: list[int | str] = sorted(labels.unique().to_pylist())
    names = [_name(value, class_names) for value in values]
    if wanted is not None:
        chosen = [_position(label, values, names, where) for label in wanted]
        if len(set(chosen)) < len(chosen):
            raise DataError(f"{where}: need every one of data.labels once, got {list(wanted)}")
        values, names = [values[i] for i in chosen], [names[i] for i in chosen]
    if wanted is None and len(values) == len(labels) > _MANY:
        raise DataError(
            f"{where}: need labels that several rows share, got another one in each of the"
            f" {len(labels)} rows, such as {values[0]!r}; name the column of the classes in"
            " data.label_column"
        )
    if len(values) < 2:
        raise DataError(f"{where}: need at least 2 classes, got {len(values)}: {values}")
    return Classes(tuple(values), tuple(names))


def notes_on(classes: Classes, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """Return notes for the user on similar and on unnamed classes."""
    similar = naming.alike(classes.names, "labels")
    notes = [] if similar is None else [similar]
    if class_names is None:
        return tuple(notes)
    numbers = (value for value in classes.values if isinstance(value, int))
    unnamed = [str(number) for number in numbers if not 0 <= number < len(class_names)]
    if unnamed:
        notes.append(
            f"labels {', '.join(unnamed)} have no name in the data set and count as classes too;"
            " list the labels to keep in data.labels"
        )
    return tuple(notes)


def number(labels: pa.ChunkedArray, classes: Classes) -> pa.ChunkedArray:
    """Return int64 class numbers, null for labels of no class."""
    values = pa.array(classes.values)
    if values.type != labels.type:
        return pa.chunked_array([pa.nulls(len(labels), pa.int64())])
    return pc.cast(pc.index_in(labels, value_set=values), pa.int64())


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
        f"{where}: need data.labels from the data set, got {label!r}; its labels are"
        f" {', '.join(written)}"
    )
