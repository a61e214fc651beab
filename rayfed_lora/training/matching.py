"""Data and model brought together: classes, tokens, pixels and weights as the source knows them.

Source: this project.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import nn

from rayfed_lora.data.tables import IMAGE_TASK, LANGUAGE_TASK, Dataset
from rayfed_lora.errors import ModelError
from rayfed_lora.models import sources
from rayfed_lora.models.causality import check_causal
from rayfed_lora.models.fit import fit_notes
from rayfed_lora.models.labels import HeadMatch
from rayfed_lora.models.loading import Loading, class_tensors, head_match, loading
from rayfed_lora.models.padding import (
    check_vocabulary,
    give_padding_token,
    padding_notes,
    settle_padding,
    token_facts,
)
from rayfed_lora.models.pixels import Pixels, pixels_of
from rayfed_lora.recipe.recipe import Recipe

# Images that take so much memory are worth a note.
_MANY_GIGABYTES = 4.0


@dataclass(frozen=True)
class Match:
    """A data set and the model that fits it.

    Attributes:
        dataset: its classes in the order of the source's head.
        config: transformers' configuration of the model.
        net: the model on the meta device.
        tokenizer: with a padding token where it can have one; None for images.
        pixels: what prepares images; None: they stay as they are.
        notes: what the user should know, one line each.
    """

    dataset: Dataset
    config: Any
    net: nn.Module
    tokenizer: Any
    pixels: Pixels | None
    notes: tuple[str, ...]


def match(recipe: Recipe, dataset: Dataset, *, here_only: bool) -> Match:
    """Return the model for a data set, checked as far as no weight and no text must be read.

    Args:
        recipe: the run.
        dataset: its data.
        here_only: download no weights: what is not here stays unchecked.

    Raises:
        ModelError: configuration, tokenizer, image processor or weights cannot be read, or do not
            fit the data or each other.
    """
    model, notes = recipe.model, []
    names: tuple[str, ...] = ()
    found: HeadMatch | None = None
    if model.task != LANGUAGE_TASK:
        found, names = head_match(model, dataset.label_names)
        dataset = _ordered(dataset, found)
    tokenizer = None
    if model.task != IMAGE_TASK:
        tokenizer = sources.tokenizer(model)
    if tokenizer is not None and model.task != LANGUAGE_TASK:
        taken = give_padding_token(tokenizer)
        if taken is not None:
            notes.append(f"the tokenizer has no padding token: texts are padded with {taken!r}")
    config = sources.configuration(model, _facts(recipe, dataset, tokenizer))
    if found is not None and getattr(config, "problem_type", None) is not None:
        # The source's regression or several labels an example; here each example has one class.
        config.problem_type = "single_label_classification"
    _check_classes(recipe, config, dataset)
    if model.task == LANGUAGE_TASK:
        check_causal(model, config)
    net = sources.skeleton(model, config)
    if tokenizer is not None:
        if model.task != LANGUAGE_TASK:
            settle_padding(config, net, tokenizer, model)
            notes += padding_notes(net)
        check_vocabulary(net, tokenizer, None if model.task == LANGUAGE_TASK else config)
    pixels = None
    if model.task == IMAGE_TASK:
        pixels, shape, told = _pixels(recipe, config, dataset)
        notes += told
        _check_images(config, shape, prepared=pixels is not None)
    told_of = loading(model, config, here_only=here_only)
    if told_of is not None:
        notes += fit_notes(net, told_of, recipe)
        if found is not None:
            notes += _head_notes(recipe, config, dataset, found, names, told_of)
    return Match(dataset, config, net, tokenizer, pixels, tuple(notes))


def _ordered(dataset: Dataset, found: HeadMatch) -> Dataset:
    """Number the classes in the order of the head."""
    if found.order == tuple(range(len(dataset.label_names))):
        return dataset
    place = np.argsort(found.order)  # of each class of the data among the outputs of the head

    def numbered(table: pa.Table) -> pa.Table:
        labels = place[table["label"].to_numpy()].astype(np.int64)
        return table.set_column(table.column_names.index("label"), "label", pa.array(labels))

    return replace(
        dataset,
        train=numbered(dataset.train),
        validation=None if dataset.validation is None else numbered(dataset.validation),
        test=numbered(dataset.test),
        label_names=tuple(dataset.label_names[i] for i in found.order),
    )


def _facts(recipe: Recipe, dataset: Dataset, tokenizer: Any) -> dict[str, Any]:
    """Return what the data say of the model's configuration; a recipe's own values win."""
    language = recipe.model.task == LANGUAGE_TASK
    facts = {} if language else sources.label_facts(dataset.label_names)
    if recipe.model.source == "config" and tokenizer is not None:
        facts |= token_facts(tokenizer, padding=not language)
    if recipe.model.task == IMAGE_TASK and recipe.model.source == "config":
        channels, height, _ = dataset.test["image"].type.shape
        facts |= {"num_channels": channels, "image_size": height}
    return facts


def _check_classes(recipe: Recipe, config: Any, dataset: Dataset) -> None:
    classes = len(dataset.label_names)
    if recipe.model.task != LANGUAGE_TASK and config.num_labels != classes:
        raise ModelError(
            f"model.config.num_labels: expected {classes}, the classes in the data,"
            f" got {config.num_labels}"
        )


def _pixels(
    recipe: Recipe, config: Any, dataset: Dataset
) -> tuple[Pixels | None, tuple[int, ...], Sequence[str]]:
    """Return what prepares the images, the shape of a prepared one, and notes."""
    size = getattr(config, "image_size", None)
    own_size = size if "image_size" in recipe.model.config and isinstance(size, int) else None
    pixels = pixels_of(recipe.model, getattr(config, "num_channels", 3), own_size)
    where = f"model.source {recipe.model.source!r}"
    given = tuple(dataset.test["image"].type.shape)
    if pixels is None:
        hub = (
            recipe.model.source != "config"
            and not Path(sources.location(recipe.model.source)).is_dir()
        )
        plain = f"{where}: no image processor is found, pixels are scaled to [-1, 1]"
        return None, given, [plain] if hub and not dataset.floats else []
    if dataset.floats:
        told = (
            f"{where}: its image processor is not applied, since pixels that are given as floats"
            " are kept as they are"
        )
        return None, given, [told]
    shape = prepared_images(dataset.test.slice(0, 1), pixels).shape[1:]
    became, came = (" x ".join(map(str, s)) for s in (shape, given))
    told = f"images ({came}) are prepared as {where} does ({became}): {pixels}"
    if own_size is not None:
        told += f"; the size is model.config.image_size, {own_size}"
    notes = [told]
    tables = (dataset.train, dataset.test, dataset.validation)
    rows = sum(table.num_rows for table in tables if table is not None)
    gigabytes = 4e-9 * rows * math.prod(shape)
    if gigabytes >= _MANY_GIGABYTES:
        notes.append(
            f"{rows} images of {became} take {gigabytes:.0f} GB of memory; data.max_examples takes"
            " fewer for training"
        )
    return pixels, shape, notes


def prepared_images(table: pa.Table, pixels: Pixels | None) -> npt.NDArray[np.float32]:
    """Return the images of a table as the model takes them, (n, channels, height, width)."""
    column = table["image"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        images = np.zeros((0, *column.type.shape), np.float32)
    else:
        images = column.to_numpy_ndarray()
    return images if pixels is None or len(images) == 0 else pixels(images)


def _check_images(config: Any, shape: Sequence[int], *, prepared: bool) -> None:
    size = getattr(config, "image_size", None)
    if not isinstance(size, int):
        return
    channels = getattr(config, "num_channels", 3)
    if tuple(shape) != (channels, size, size):
        came = "its image processor gives" if prepared else "the data have"
        raise ModelError(
            f"model.config: expected images of {channels} x {size} x {size}"
            f" (num_channels, image_size), {came} {' x '.join(map(str, shape))}"
        )


def _head_notes(
    recipe: Recipe,
    config: Any,
    dataset: Dataset,
    found: HeadMatch,
    names: Sequence[str],
    told: Loading,
) -> Sequence[str]:
    """Return what becomes of a head that the source brings along."""
    sized = class_tensors(recipe.model, config)
    if not sized or sized & {*told.missing, *told.mismatched}:
        return []
    where = f"model.source {recipe.model.source!r}"
    known, wanted = (_few(each) for each in (names, dataset.label_names))
    if found.kind == "other":
        return [
            f"{where}: its head is for other classes ({known}) than the data's ({wanted}):"
            " drawn at random"
        ]
    if found.kind == "numbers":
        return [f"{where}: the data's classes {wanted} are taken for those of its head, {known}"]
    if found.kind == "unknown":
        return [
            f"{where}: its head is kept but does not name its classes; they are taken in the order"
            f" {wanted} (give model.config.id2label where this is wrong)"
        ]
    if found.order != tuple(range(len(found.order))):
        return [f"classes are numbered as in the head of {where}: {wanted}"]
    return []


def _few(names: Sequence[str]) -> str:
    rest = len(names) - 6
    return ", ".join(names[:6]) + (f" and {rest} more" if rest > 0 else "")
