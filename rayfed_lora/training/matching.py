"""The model for a data set: configuration, tokenizer and image processor, checked against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from rayfed_lora.data.columns import IMAGE_TASK, LANGUAGE_TASK
from rayfed_lora.data.dataset import Dataset
from rayfed_lora.errors import ModelError
from rayfed_lora.models import base_models
from rayfed_lora.models.base_weights import LoadReport, class_tensors, load_report
from rayfed_lora.models.causality import check_causal
from rayfed_lora.models.causes import tried
from rayfed_lora.models.fit import fit_notes
from rayfed_lora.models.image_processor import ImageProcessor
from rayfed_lora.models.labels import HeadMatch, match_head
from rayfed_lora.models.limits import check_size
from rayfed_lora.models.packing import check_packing
from rayfed_lora.models.tokenizer import (
    check_vocabulary,
    give_padding_token,
    padding_notes,
    read_tokenizer,
    settle_padding,
    token_facts,
)
from rayfed_lora.models.wording import listed, where
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.image_inputs import fit_images

# Classes that a note names.
_NAMED = 6


@dataclass(frozen=True)
class Match:
    """A data set and the model that fits it.

    Attributes:
        dataset: its classes in the order of the source's head.
        config: transformers' configuration of the model.
        net: the model on the meta device.
        tokenizer: with a padding token where it can have one; None for images.
        image_processor: None: pixels are used as they are.
        notes: for the user, one line each.
    """

    dataset: Dataset
    config: Any
    net: nn.Module
    tokenizer: Any
    image_processor: ImageProcessor | None
    notes: tuple[str, ...]


def match(recipe: Recipe, dataset: Dataset, *, local_only: bool) -> Match:
    """Return the model for a data set, checked without reading a weight or a text.

    Args:
        recipe: the run.
        dataset: its data.
        local_only: download no weights; weights that are not on this machine stay unchecked.

    Raises:
        ModelError: configuration, tokenizer, image processor or weights cannot be read, or do not
            fit the data or each other.
    """
    model, notes = recipe.model, []
    language, images = model.task == LANGUAGE_TASK, model.task == IMAGE_TASK
    head = None if language else match_head(model, dataset.label_names)
    if head is not None:
        dataset = _order_as_head(dataset, head)
    tokenizer = None if images else read_tokenizer(model)
    if tokenizer is not None and not language:
        token = give_padding_token(tokenizer)
        if token is not None:
            notes.append(f"the tokenizer has no padding token: texts are padded with {token!r}")
    config = base_models.configuration(model, _facts(recipe, dataset, tokenizer))
    # Before the model is built: some (LeViT) take long for large images.
    image_processor = None
    if images:
        image_processor, image_notes = fit_images(recipe, config, dataset)
        notes += image_notes
    net = tried(model, config, partial(_skeleton, recipe, here=not local_only))
    if language:
        check_causal(model, config)
        if recipe.data.packing:
            check_packing(model, config)
    else:
        if getattr(config, "problem_type", None) is not None:
            # The source may be for regression or several labels; here an example has one class.
            config.problem_type = "single_label_classification"
        _check_classes(config, dataset)
    if tokenizer is not None and not language:
        settle_padding(config, net, tokenizer, model)
        notes += padding_notes(net)
    if tokenizer is not None:
        check_vocabulary(net, tokenizer, None if language else config)
    report = load_report(model, config, local_only=local_only)
    if report is not None:
        notes += fit_notes(net, report, recipe)
    if report is not None and head is not None:
        notes += _class_notes(recipe, config, dataset.label_names, head, report)
    return Match(dataset, config, net, tokenizer, image_processor, tuple(notes))


def _skeleton(recipe: Recipe, config: Any, *, here: bool) -> nn.Module:
    """Return the model on the meta device, if it is not too large; `here`: for this machine."""
    net = base_models.skeleton(recipe.model, config)
    check_size(net, recipe.model, here=here or recipe.runtime.executor == "local")
    return net


def _facts(recipe: Recipe, dataset: Dataset, tokenizer: Any) -> dict[str, Any]:
    """Return the configuration entries that follow from the data; the recipe's take precedence."""
    language = recipe.model.task == LANGUAGE_TASK
    facts = {} if language else base_models.label_facts(dataset.label_names)
    if recipe.model.source == "config" and tokenizer is not None:
        facts |= token_facts(tokenizer, padding=not language)
        if recipe.model.own is not None:
            facts["max_position_embeddings"] = recipe.data.max_length
    if recipe.model.source == "config" and recipe.model.task == IMAGE_TASK:
        channels, height, width = dataset.test["image"].type.shape
        # Own models may be for rows of numbers, and other images that are not square.
        size = height if height == width or recipe.model.own is None else [height, width]
        facts |= {"num_channels": channels, "image_size": size}
    return facts


def _order_as_head(dataset: Dataset, head: HeadMatch) -> Dataset:
    """Return the data set with its classes numbered as the outputs of the head."""
    if not head.reorders:
        return dataset
    output = np.argsort(head.order)  # by class of the data

    def renumbered(table: pa.Table) -> pa.Table:
        labels = output[table["label"].to_numpy()].astype(np.int64)
        return table.set_column(table.column_names.index("label"), "label", pa.array(labels))

    return replace(
        dataset,
        train=renumbered(dataset.train),
        validation=None if dataset.validation is None else renumbered(dataset.validation),
        test=renumbered(dataset.test),
        label_names=tuple(dataset.label_names[i] for i in head.order),
    )


def _check_classes(config: Any, dataset: Dataset) -> None:
    """Check that a classifier has as many outputs as the data have classes."""
    classes = len(dataset.label_names)
    if config.num_labels != classes:
        raise ModelError(
            f"model.config.num_labels: expected {classes}, the classes in the data,"
            f" got {config.num_labels}"
        )


def _class_notes(
    recipe: Recipe, config: Any, label_names: Sequence[str], head: HeadMatch, report: LoadReport
) -> list[str]:
    """Return a note on how the source's trained head is used; none where the head is new.

    `label_names` are in the order of the head.
    """
    tensors = class_tensors(recipe.model, config)
    if not tensors or tensors & {*report.missing, *report.mismatched}:
        return []
    source = where(recipe.model)
    known, wanted = (listed(names, _NAMED) for names in (head.names, label_names))
    if head.kind == "other":
        return [
            f"{source}: its head is for other classes ({known}) than the data's ({wanted}):"
            " initialised at random"
        ]
    if head.kind == "numbers":
        return [f"{source}: the data's classes {wanted} are taken for those of its head, {known}"]
    if head.kind == "unknown":
        return [
            f"{source}: its head is kept but does not name its classes; they are taken in the order"
            f" {wanted} (give model.config.id2label where this is wrong)"
        ]
    if head.reorders:
        return [f"classes are numbered as in the head of {source}: {wanted}"]
    return []
