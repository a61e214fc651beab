"""The data set of a recipe: loaded, labels numbered, rows split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from rayfed_lora import seeds
from rayfed_lora.data import classes, columns, images, naming, sources, turns
from rayfed_lora.data.columns import IMAGE_TASK
from rayfed_lora.data.place import Place
from rayfed_lora.data.raw_tables import RawData
from rayfed_lora.errors import DataError
from rayfed_lora.plugins.tables import DATA
from rayfed_lora.recipe.data import Data

LANGUAGE_TASK = columns.LANGUAGE_TASK
_PLAIN = turns.Format("text", {})
# The column of instruction and chat data whose values answers are scored by.
_DOMAIN = "domain"
# The only class of texts without labels.
_UNLABELLED = classes.Classes(("text",), ("text",))
# Counters of the split stream.
_COUNTERS = {"test": 0, "validation": 1, "subset": 2}


@dataclass(frozen=True)
class Dataset:
    """A data set ready to be dealt to clients and trained on.

    Every table has the column `text` (string), `turns` (`turns.TYPE`) or `image` (fixed-shape
    tensor, float32, channels x height x width, pixels in [-1, 1]) and `label` (int64, 0 .. classes
    - 1); with partition kind `column` the training rows also have `client` (string), and for each
    requested column of numbers a `number_column` (float64).

    Attributes:
        train: the rows to deal to clients.
        validation: rows kept on the server, or None.
        test: the official test split, or rows split off from the source.
        label_names: the name of class i at place i.
        floats: whether the source's pixels are floats, which are kept unscaled in any range.
        official_test: whether the source has a test split.
        clients: every client of the source, including those of test rows only; None where clients
            have no names.
        notes: messages for the user on how the data were read, one line each.
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
    data: Data, task: str, seed: int, validation_fraction: float, numbers: Sequence[str] = ()
) -> Dataset:
    """Read, clean and split the data set that a recipe names.

    Rows are drawn in this order: the test split (where the source has none), the validation split
    out of the rest, then `data.max_examples` of what is left for training. `numbers` are columns of
    positive numbers to keep with the training rows.

    Raises:
        DataError: the source cannot be found, read or used as the recipe asks.
    """
    raw = sources.read(data, task, numbers, seed)
    where = sources.place("data.source", data.source, raw.files)
    form = _PLAIN
    if task == LANGUAGE_TASK:
        form = turns.format_of(raw.train, data, where)
    by_column = data.partition.kind == "column"
    rows = _select(raw.train, where, data, task, form, by_column, raw.typed)
    for name in numbers:
        column, place = columns.pick(raw.train, (name,), "source", where)
        values = columns.as_positive(column, place, raw.typed)
        rows = rows.append_column(number_column(name), values)
    found = _UNLABELLED
    if "label" in rows.column_names:
        found = classes.find_classes(rows["label"], data.labels, raw.class_names, str(where))
    notes = raw.notes + form.notes + classes.notes_on(found, raw.class_names)
    clients = None
    if "client" in rows.column_names:
        clients = tuple(naming.in_order(rows["client"].unique().to_pylist()))
        alike = naming.alike(clients, f"clients of column {data.partition.column!r}")
        notes += () if alike is None else (alike,)
    keep_only = data.labels is not None
    train = _numbered(rows, found, keep_only, where)
    if raw.test is None:
        train, test = _split(train, data.test_fraction, seed, "test", where)
        test = test.drop_columns([number_column(name) for name in numbers])
    else:
        test = _official_test(raw, data, task, form, found)
        if train.schema.field(0).type != test.schema.field(0).type:
            raise DataError(
                f"{where}: need test images of the training images' shape"
                f" {train['image'].type.shape}, got {test['image'].type.shape}"
            )
    validation = None
    if validation_fraction > 0:
        train, validation = _split(train, validation_fraction, seed, "validation", where)
    return Dataset(
        train=_subset(train, data.max_examples, seed),
        validation=validation,
        test=test,
        label_names=found.names,
        floats=_are_floats(raw.train, data.source, data, task),
        official_test=raw.test is not None,
        clients=clients,
        notes=notes,
    )


def _are_floats(table: pa.Table, source: str | Sequence[str], data: Data, task: str) -> bool:
    built_in = isinstance(source, str) and source in DATA and DATA.method(source).built_in
    if task != IMAGE_TASK or built_in:
        return False
    column, _ = columns.find(table, data, "image_column", Place(""))
    return images.are_floats(column.type)


def _official_test(
    raw: RawData, data: Data, task: str, form: turns.Format, found: classes.Classes
) -> pa.Table:
    """Return the test rows of the source, or of `data.test_source`, as the training rows are."""
    where = sources.place("data.source", data.source, raw.test_files).inside("test split")
    if data.test_source is not None:
        where = sources.place("data.test_source", data.test_source, raw.test_files)
    tested = data.source if data.test_source is None else data.test_source
    floats = _are_floats(raw.train, data.source, data, task)
    if _are_floats(raw.test, tested, data, task) != floats:
        raise DataError(
            f"{where}: need pixels like the training images', which are"
            f" {'floats, used unscaled' if floats else 'whole numbers from 0 to 255'}"
        )
    # Labels are texts where those of the training rows are, even if all of these are numbers.
    texts = isinstance(found.values[0], str) and not {*found.values} <= {"false", "true"}
    if form.kind != "text":
        other = turns.format_of(raw.test, data, where)
        if other.kind != form.kind:
            raise DataError(f"{where}: need rows of {form.kind} like the training rows")
        form = other
    names = () if raw.test is None else raw.test.column_names
    named = data.partition.kind == "column" and data.partition.column in names
    by_column = form.kind != "text" and named
    typed = raw.test_typed or texts
    test = _select(raw.test, where, data, task, form, by_column, typed)
    return _numbered(test, found, data.labels is not None, where)


def _select(
    table: pa.Table,
    where: Place,
    data: Data,
    task: str,
    form: turns.Format,
    with_client: bool = False,
    typed: bool = True,
) -> pa.Table:
    """Return `text`, `turns` or `image`, the raw `label`, and `client`, each in its final type."""
    if table.num_rows == 0:
        raise DataError(f"{where}: need rows, got an empty table")
    selected = {}
    if task == IMAGE_TASK:
        selected["image"] = images.as_tensors(
            *columns.find(table, data, "image_column", where), data.resize
        )
    elif form.kind != "text":
        selected[turns.TURNS] = turns.as_turns(table, form, where)
    else:
        selected["text"] = columns.as_strings(*columns.find(table, data, "text_column", where))
    if task != LANGUAGE_TASK or _uses_labels(data):
        labels = columns.find(table, data, "label_column", where)
        selected["label"] = columns.as_labels(*labels, typed)
    if form.kind != "text" and _DOMAIN in table.column_names:
        column, place = columns.pick(table, (_DOMAIN,), "format", where)
        selected[_DOMAIN] = columns.as_client_names(column, place, typed)
    name = data.partition.column
    if with_client and name is not None:
        found = columns.pick(table, (name,), "partition.column", where)
        selected["client"] = columns.as_client_names(*found, typed)
    return pa.table(selected)


def number_column(name: str) -> str:
    """Return the name that a source's column of numbers has among the training rows."""
    return f"number {name}"


def _uses_labels(data: Data) -> bool:
    """Return whether a recipe asks for labels where the task does not need them."""
    by_label = data.partition.kind in ("dirichlet", "shards")
    return by_label or data.labels is not None or data.label_column != columns.AUTO


def _numbered(rows: pa.Table, known: classes.Classes, keep_only: bool, where: Place) -> pa.Table:
    """Replace labels by class numbers; rows of no class are dropped, or an error."""
    if "label" not in rows.column_names:
        return rows.append_column("label", pa.array(np.zeros(rows.num_rows, np.int64)))
    numbers = classes.number(rows["label"], known)
    if numbers.null_count > 0 and not keep_only:
        unknown = sorted(set(rows["label"].unique().to_pylist()) - set(known.values), key=str)
        raise DataError(
            f"{where}: need only labels that training rows have"
            f" ({', '.join(map(str, known.values))}), got {', '.join(map(str, unknown))};"
            " list the labels to keep in `data.labels`"
        )
    place = rows.column_names.index("label")
    numbered = rows.set_column(place, "label", numbers)
    if numbers.null_count > 0:
        numbered = numbered.filter(numbers.is_valid())
    if numbered.num_rows == 0:
        raise DataError(f"{where}: need rows with data.labels, got none")
    return numbered


def _split(
    table: pa.Table, fraction: float, seed: int, name: Literal["test", "validation"], where: Place
) -> tuple[pa.Table, pa.Table]:
    """Return the remaining rows, and ceil(fraction * rows) random ones; both keep their order.

    Stratified by `label` where every class has enough members. Each name has its own stream.
    """
    from sklearn.model_selection import train_test_split

    total = table.num_rows
    cut = math.ceil(fraction * total)
    if cut >= total:
        raise DataError(
            f"{where}: need rows left for training, got {total} rows of which a share of"
            f" {fraction:g} is kept for the {name} split"
        )
    labels = table["label"].to_numpy()
    members = np.unique(labels, return_counts=True)[1]
    stratify = members.min() >= 2 and len(members) <= min(cut, total - cut)
    state = int(seeds.sequence(seed, seeds.Purpose.SPLIT, _COUNTERS[name]).generate_state(1)[0])
    rest, kept = train_test_split(
        np.arange(total), test_size=cut, random_state=state, stratify=labels if stratify else None
    )
    return table.take(np.sort(rest)), table.take(np.sort(kept))


def _subset(table: pa.Table, size: int | None, seed: int) -> pa.Table:
    """Return `size` random rows in their order, or all where there are no more than that."""
    if size is None or size >= table.num_rows:
        return table
    rng = seeds.generator(seed, seeds.Purpose.SPLIT, _COUNTERS["subset"])
    return table.take(np.sort(rng.choice(table.num_rows, size, replace=False)))
