"""The classes of a data set and those of a model's head. Source: this project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from rayfed_lora.data.dataset import Dataset
from rayfed_lora.errors import ModelError
from rayfed_lora.models.labels import HeadMatch
from rayfed_lora.models.loading import LoadReport, class_tensors
from rayfed_lora.models.wording import listed, where
from rayfed_lora.recipe.recipe import Recipe

# Classes that a note names.
_NAMED = 6


def order_as_head(dataset: Dataset, match: HeadMatch) -> Dataset:
    """Return the data set with its classes numbered as the outputs of the head."""
    if not match.reorders:
        return dataset
    output = np.argsort(match.order)  # by class of the data

    def renumbered(table: pa.Table) -> pa.Table:
        labels = output[table["label"].to_numpy()].astype(np.int64)
        return table.set_column(table.column_names.index("label"), "label", pa.array(labels))

    return replace(
        dataset,
        train=renumbered(dataset.train),
        validation=None if dataset.validation is None else renumbered(dataset.validation),
        test=renumbered(dataset.test),
        label_names=tuple(dataset.label_names[i] for i in match.order),
    )


def check_classes(config: Any, dataset: Dataset) -> None:
    """Check that a classifier has as many outputs as the data have classes.

    Raises:
        ModelError: it has not.
    """
    classes = len(dataset.label_names)
    if config.num_labels != classes:
        raise ModelError(
            f"model.config.num_labels: expected {classes}, the classes in the data,"
            f" got {config.num_labels}"
        )


def class_notes(
    recipe: Recipe,
    config: Any,
    label_names: Sequence[str],
    match: HeadMatch,
    report: LoadReport,
) -> list[str]:
    """Return a note for the user on how the source's trained head is used.

    There is none where the head is new. `label_names` are in the order of the head.
    """
    tensors = class_tensors(recipe.model, config)
    if not tensors or tensors & {*report.missing, *report.mismatched}:
        return []
    source = where(recipe.model)
    known, wanted = (listed(names, _NAMED) for names in (match.names, label_names))
    if match.kind == "other":
        return [
            f"{source}: its head is for other classes ({known}) than the data's ({wanted}):"
            " initialised at random"
        ]
    if match.kind == "numbers":
        return [f"{source}: the data's classes {wanted} are taken for those of its head, {known}"]
    if match.kind == "unknown":
        return [
            f"{source}: its head is kept but does not name its classes; they are taken in the order"
            f" {wanted} (give model.config.id2label where this is wrong)"
        ]
    if match.reorders:
        return [f"classes are numbered as in the head of {source}: {wanted}"]
    return []
