"""Load a data set: pick its columns, number its labels, split it.

Source: this project.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayfed_lora import seeds
from rayfed_lora.data import builtin, columns, images, naming, sources
from rayfed_lora.errors import DataError
from rayfed_lora.recipe.data import Data

IndexArray = npt.NDArray[np.int64]
IMAGE_TASK, LANGUAGE_TASK = "image-classification", "causal-lm"
# The one class of texts that have no labels.
NO_CLASS = "text"
Draw = Literal["test", "validation", "subset"]
COUNTER: Mapping[Draw, int] = {"test": 0, "validation": 1, "subset": 2}  # of the split stream


@dataclass(frozen=True)
class Dataset:
    """A data set ready to be dealt and trained on.

    Every table has the column `text` (string) or `image` (fixed-shape tensor, float32, channels x
    height x width, pixels in [-1, 1]) and `label` (int64, 0 .. classes - 1); with partition kind
    `column` the training rows also have `client` (string), and for each column of numbers that
    is asked for a `number_column` (float64).

    Attributes:
        train: the rows to deal to clients.
        validation: rows kept on the server, or None.
        test: the official test split, or rows cut from the source.
        label_names: the name of class i at place i.
        floats: whether pixels came as floats and are kept as they are, in whatever range.
        official_test: whether the source has a test split.
        clients: every client that the source names, also those of test rows only; None where
            clients have no names.
        notes: what the user should know of how the data were read, one line each.
    """

    train: pa.Table
    validation: pa.Table | None
    test: pa.Table
    label_names: tuple[str, ...]
    floats: bool = False
    official_test: bool = False
    clients: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def load(
    data: Data,
    task: str,
    seed: int,
    validation_fraction: float,
    numbers: Sequence[str] = (),
) -> Dataset:
    """Read, clean and split the data set that a recipe names.

    Rows are drawn in this order: the test split (where the source has none), the validation split
    out of the rest, then `data.max_examples` of what is left for training. Both splits keep the
    class shares where every class has enough members, and are plainly random otherwise.

    Args:
        data: the recipe's section.
        task: the recipe's `model.task`.
        seed: the run's seed.
        validation_fraction: share of the training rows kept for validation, 0 for none.
        numbers: columns of positive numbers to keep of the training rows.

    Raises:
        DataError: the source cannot be found, read or used as asked.
    """
    raw = _read(data, task)
    rows = _select(raw.train, data, task, data.partition.kind == "column", raw.typed)
    rows = _with_numbers(rows, raw, numbers, data.source)
    where = f"data.source {data.source!r}"
    if "label" in rows.column_names:
        classes = columns.find_classes(rows["label"], data.labels, raw.class_names, where)
    else:
        classes = columns.Classes((NO_CLASS,), (NO_CLASS,))
    notes = columns.notes_on(classes, raw.class_names)
    clients = None
    if "client" in rows.column_names:
        clients = tuple(naming.in_order(rows["client"].unique().to_pylist()))
        alike = naming.alike(clients, f"clients of column {data.partition.column!r}")
        notes += () if alike is None else (alike,)
    keep_only = data.labels is not None
    train = _number(rows, classes, keep_only, where)
    if raw.test is None:
        train, test = _split(train, data.test_fraction, seed, "test", where)
    else:
        test = _number(_select(raw.test, data, task), classes, keep_only, f"{where}, test split")
        _require_one_shape(train, test, where)
    if raw.test is None:
        test = test.drop_columns([number_column(name) for name in numbers])
    validation = None
    if validation_fraction > 0:
        train, validation = _split(train, validation_fraction, seed, "validation", where)
    train = _subset(train, data.max_examples, seed)
    floats = _are_floats(raw.train, data, task)
    official = raw.test is not None
    return Dataset(train, validation, test, classes.names, floats, official, clients, notes)


def _are_floats(table: pa.Table, data: Data, task: str) -> bool:
    if task != IMAGE_TASK or data.source in builtin.BUILTIN:
        return False
    names = columns.names_of(data.image_column, columns.IMAGE_COLUMNS)
    name = columns.pick(table, names, "image_column", data.source)
    return images.are_floats(table[name].type)


def _read(data: Data, task: str) -> sources.RawData:
    source = data.source
    if source in builtin.BUILTIN:
        return builtin.read(source, task)
    if source.startswith(sources.HUB_PREFIX):
        return sources.read_hub(source, columns.names_of(data.label_column, columns.LABEL_COLUMNS))
    if sources.suffix_of(source) not in sources.READERS:
        near = difflib.get_close_matches(source, builtin.BUILTIN, n=1)
        raise DataError(
            f"data.source {source!r}: need a built-in name ({', '.join(builtin.BUILTIN)}), a path"
            f" or URI ending in {' '.join(sources.READERS)}, or hf:<id>"
            + (f" (did you mean {near[0]!r}?)" if near else "")
        )
    client = () if data.partition.column is None else (data.partition.column,)
    texts = columns.names_of(data.text_column, columns.TEXT_COLUMNS)
    labels = columns.names_of(data.label_column, columns.LABEL_COLUMNS)
    return sources.read_file(source, (*texts, *labels, *client))


def _select(
    table: pa.Table,
    data: Data,
    task: str,
    with_client: bool = False,
    typed: bool = True,
) -> pa.Table:
    """Return `text` or `image`, the raw `label`, and `client`, each in its final type."""
    source = data.source
    if table.num_rows == 0:
        raise DataError(f"data.source {source!r}: need rows, got an empty table")

    def find(option: str, names: tuple[str, ...]) -> tuple[pa.ChunkedArray, str]:
        name = columns.pick(table, names, option, source)
        return table[name], f"data.source {source!r}, column {name!r}"

    selected = {}
    if task != IMAGE_TASK:
        column = find("text_column", columns.names_of(data.text_column, columns.TEXT_COLUMNS))
        selected["text"] = columns.as_strings(*column)
    else:
        column = find("image_column", columns.names_of(data.image_column, columns.IMAGE_COLUMNS))
        selected["image"] = images.as_tensors(*column)
    labels = columns.names_of(data.label_column, columns.LABEL_COLUMNS)
    if task != LANGUAGE_TASK or _uses_labels(data):
        column, where = find("label_column", labels)
        if not typed and naming.is_text(column.type):
            column = naming.csv_labels(column, where)
        selected["label"] = columns.as_labels(column, where)
    if with_client and data.partition.column is not None:
        column, where = find("partition.column", (data.partition.column,))
        if not typed and naming.is_text(column.type):
            column = naming.csv_names(column)
        selected["client"] = columns.as_client_names(column, where)
    return pa.table(selected)


def number_column(name: str) -> str:
    """Return what a column of numbers of the source is called among the training rows."""
    return f"number {name}"


def _with_numbers(
    rows: pa.Table, raw: sources.RawData, numbers: Sequence[str], source: str
) -> pa.Table:
    for name in numbers:
        found = columns.pick(raw.train, (name,), "source", source)
        where = f"data.source {source!r}, column {found!r}"
        column = raw.train[found]
        if not raw.typed and naming.is_text(column.type):
            # It names classes or clients too, and has been read as texts for that.
            column = columns.as_numbers(column, where)
        rows = rows.append_column(number_column(name), columns.as_positive(column, where))
    return rows


def _uses_labels(data: Data) -> bool:
    """Return whether a recipe asks for labels where the task does not need them."""
    by_label = data.partition.kind in ("dirichlet", "shards")
    return by_label or data.labels is not None or data.label_column != columns.AUTO


def _number(rows: pa.Table, classes: columns.Classes, keep_only: bool, where: str) -> pa.Table:
    """Replace labels by class numbers; rows of no class are dropped, or an error."""
    if "label" not in rows.column_names:
        return rows.append_column("label", pa.array(np.zeros(rows.num_rows, np.int64)))
    numbers = columns.number(rows["label"], classes)
    if numbers.null_count > 0 and not keep_only:
        strange = sorted(set(rows["label"].unique().to_pylist()) - set(classes.values), key=str)
        raise DataError(
            f"{where}: need only labels that training rows have"
            f" ({', '.join(map(str, classes.values))}), got {', '.join(map(str, strange))};"
            " list those to keep in `data.labels`"
        )
    place = rows.column_names.index("label")
    numbered = rows.set_column(place, "label", numbers)
    if numbers.null_count > 0:
        numbered = numbered.filter(numbers.is_valid())
    if numbered.num_rows == 0:
        raise DataError(f"{where}: need rows with data.labels, got none")
    return numbered


def _split(
    table: pa.Table, fraction: float, seed: int, draw: Draw, where: str
) -> tuple[pa.Table, pa.Table]:
    """Cut ceil(fraction * rows) random rows off; both parts keep the order of rows."""
    from sklearn.model_selection import train_test_split

    total = table.num_rows
    cut = math.ceil(fraction * total)
    if cut >= total:
        raise DataError(
            f"{where}: need rows left for training, got {total} rows of which a share of"
            f" {fraction:g} is kept for the {draw} split"
        )
    labels = table["label"].to_numpy()
    members = np.unique(labels, return_counts=True)[1]
    stratify = members.min() >= 2 and len(members) <= min(cut, total - cut)
    state = int(seeds.sequence(seed, seeds.Purpose.SPLIT, COUNTER[draw]).generate_state(1)[0])
    rest, kept = train_test_split(
        np.arange(total),
        test_size=cut,
        random_state=state,
        stratify=labels if stratify else None,
    )
    return table.take(np.sort(rest)), table.take(np.sort(kept))


def _subset(table: pa.Table, size: int | None, seed: int) -> pa.Table:
    if size is None or size >= table.num_rows:
        return table
    rng = seeds.generator(seed, seeds.Purpose.SPLIT, COUNTER["subset"])
    return table.take(np.sort(rng.choice(table.num_rows, size, replace=False)))


def _require_one_shape(train: pa.Table, test: pa.Table, where: str) -> None:
    if train.schema.field(0).type != test.schema.field(0).type:
        raise DataError(
            f"{where}: need test images of the training images' shape"
            f" {train['image'].type.shape}, got {test['image'].type.shape}"
        )
