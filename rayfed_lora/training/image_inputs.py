"""The images of a data set as inputs of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayfed_lora.data.dataset import Dataset
from rayfed_lora.errors import ModelError
from rayfed_lora.models import base_models
from rayfed_lora.models.image_processor import ImageProcessor, read_image_processor
from rayfed_lora.models.wording import where
from rayfed_lora.recipe.recipe import Recipe

# Size of all images that is worth a note.
_MANY_GIGABYTES = 4.0


def fit_images(
    recipe: Recipe, config: Any, dataset: Dataset
) -> tuple[ImageProcessor | None, Sequence[str]]:
    """Return the image processor to apply to a data set, and notes for the user.

    None where the source has none, or where the pixels are floats, which are kept.

    Raises:
        ModelError: the processor cannot be read, or the images have another size than the model's
            inputs.
    """
    size = getattr(config, "image_size", None)
    own_size = size if "image_size" in recipe.model.config and isinstance(size, int) else None
    processor = read_image_processor(recipe.model, getattr(config, "num_channels", 3), own_size)
    shape = tuple(dataset.test["image"].type.shape)
    source, notes = where(recipe.model), []
    if processor is None:
        given = recipe.model.source
        is_hub = given != "config" and not Path(base_models.location(given)).is_dir()
        if is_hub and not dataset.floats:
            notes.append(f"{source}: no image processor is found, pixels are scaled to [-1, 1]")
    elif dataset.floats:
        processor = None
        notes.append(
            f"{source}: its image processor is not applied, since pixels that are given as floats"
            " are kept as they are"
        )
    else:
        before, shape = shape, image_inputs(dataset.test.slice(0, 1), processor).shape[1:]
        note = (
            f"images ({_text(before)}) are prepared as {source} does ({_text(shape)}): {processor}"
        )
        if own_size is not None:
            note += f"; the size is model.config.image_size, {own_size}"
        notes += [note, *_memory_note(dataset, shape)]
    _check_shape(config, shape, processed=processor is not None)
    return processor, notes


def image_inputs(table: pa.Table, processor: ImageProcessor | None) -> npt.NDArray[np.float32]:
    """Return the images of a table as inputs of the model, (n, channels, height, width)."""
    column = table["image"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        images = np.zeros((0, *column.type.shape), np.float32)
    else:
        images = column.to_numpy_ndarray()
    return images if processor is None or len(images) == 0 else processor(images)


def _memory_note(dataset: Dataset, shape: Sequence[int]) -> list[str]:
    tables = (dataset.train, dataset.test, dataset.validation)
    rows = sum(table.num_rows for table in tables if table is not None)
    gigabytes = 4e-9 * rows * math.prod(shape)
    if gigabytes < _MANY_GIGABYTES:
        return []
    return [
        f"{rows} images of {_text(shape)} take {gigabytes:.0f} GB of memory; data.max_examples"
        " takes fewer for training"
    ]


def _check_shape(config: Any, shape: Sequence[int], *, processed: bool) -> None:
    size = getattr(config, "image_size", None)
    if not isinstance(size, int):
        return
    expected = (getattr(config, "num_channels", 3), size, size)
    if tuple(shape) != expected:
        origin = "its image processor gives" if processed else "the data have"
        raise ModelError(
            f"model.config: expected images of {_text(expected)} (num_channels, image_size),"
            f" {origin} {_text(shape)}"
        )


def _text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
