"""The model for a data set: configuration, tokenizer and image processor, checked against the data.

Source: this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from rayfed_lora.data.dataset import IMAGE_TASK, LANGUAGE_TASK, Dataset
from rayfed_lora.models import sources
from rayfed_lora.models.causality import check_causal
from rayfed_lora.models.fit import fit_notes
from rayfed_lora.models.image_processor import ImageProcessor
from rayfed_lora.models.labels import match_head
from rayfed_lora.models.loading import load_report
from rayfed_lora.models.tokenizer import (
    check_vocabulary,
    give_padding_token,
    padding_notes,
    read_tokenizer,
    settle_padding,
    token_facts,
)
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.classes import check_classes, class_notes, order_as_head
from rayfed_lora.training.images import fit_images


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
        local_only: download no weights; weights that would have to be downloaded stay unchecked.

    Raises:
        ModelError: configuration, tokenizer, image processor or weights cannot be read, or do not
            fit the data or each other.
    """
    model, notes = recipe.model, []
    language, images = model.task == LANGUAGE_TASK, model.task == IMAGE_TASK
    head = None if language else match_head(model, dataset.label_names)
    if head is not None:
        dataset = order_as_head(dataset, head)
    tokenizer = None if images else read_tokenizer(model)
    if tokenizer is not None and not language:
        token = give_padding_token(tokenizer)
        if token is not None:
            notes.append(f"the tokenizer has no padding token: texts are padded with {token!r}")
    config = sources.configuration(model, _facts(recipe, dataset, tokenizer))
    if language:
        check_causal(model, config)
    else:
        if getattr(config, "problem_type", None) is not None:
            # The source may be for regression or several labels; here an example has one class.
            config.problem_type = "single_label_classification"
        check_classes(config, dataset)
    net = sources.skeleton(model, config)
    if tokenizer is not None and not language:
        settle_padding(config, net, tokenizer, model)
        notes += padding_notes(net)
    if tokenizer is not None:
        check_vocabulary(net, tokenizer, None if language else config)
    image_processor = None
    if images:
        image_processor, image_notes = fit_images(recipe, config, dataset)
        notes += image_notes
    report = load_report(model, config, local_only=local_only)
    if report is not None:
        notes += fit_notes(net, report, recipe)
    if report is not None and head is not None:
        notes += class_notes(recipe, config, dataset.label_names, head, report)
    return Match(dataset, config, net, tokenizer, image_processor, tuple(notes))


def _facts(recipe: Recipe, dataset: Dataset, tokenizer: Any) -> dict[str, Any]:
    """Return the configuration entries that follow from the data; the recipe's take precedence."""
    language = recipe.model.task == LANGUAGE_TASK
    facts = {} if language else sources.label_facts(dataset.label_names)
    if recipe.model.source == "config" and tokenizer is not None:
        facts |= token_facts(tokenizer, padding=not language)
    if recipe.model.source == "config" and recipe.model.task == IMAGE_TASK:
        channels, height, _ = dataset.test["image"].type.shape
        facts |= {"num_channels": channels, "image_size": height}
    return facts
