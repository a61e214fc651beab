"""Raw tables from the Hugging Face hub. Source: this project, on the package `datasets`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from rayfed_lora.data.sources import RawData, first_line
from rayfed_lora.errors import DataError

PREFIX = "hf:"
_HIDDEN_LABEL = -1  # marks a test split whose labels are secret


def read_hub(source: str, label_columns: Sequence[str]) -> RawData:
    """Read the `train` and, if present, the `test` split of `hf:<id>`.

    Labels get the names of the data set's own ClassLabel feature. A test split whose labels are
    all -1, the hub's mark for hidden ones, counts as absent.

    Args:
        source: `hf:` and the id of a public or cached data set.
        label_columns: possible names of the label column, in the order of the search.

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
        splits = datasets.load_dataset(source.removeprefix(PREFIX))
    except Exception as error:  # the hub's client has no common error
        raise DataError(
            f"data.source {source!r}: need a data set that `datasets` can load, got"
            f" {type(error).__name__}: {first_line(error)}"
        ) from error
    if "train" not in splits:
        raise DataError(
            f"data.source {source!r}: need a split `train`, got {', '.join(sorted(splits))}"
        )
    train = _table(splits["train"])
    test = _table(splits["test"]) if "test" in splits else None
    label = next((name for name in label_columns if name in train.column_names), None)
    if test is not None and _labels_are_hidden(test, label):
        test = None
    names = getattr(splits["train"].features.get(label), "names", None)
    return RawData(train, test, None if names is None else tuple(names))


def _table(split: Any) -> pa.Table:
    return split.with_format("arrow")[:]


def _labels_are_hidden(table: pa.Table, label: str | None) -> bool:
    present = label in table.column_names
    return present and table[label].unique().to_pylist() == [_HIDDEN_LABEL]
