"""Images as the source of a model prepares them: its own image processor.

Source: this project, on transformers' image processors.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoImageProcessor
from transformers.utils import PROCESSOR_NAME, cached_file

from rayfed_lora.errors import ModelError
from rayfed_lora.models import sources
from rayfed_lora.recipe import Model

Images = npt.NDArray[np.float32]
_FILE = "preprocessor_config.json"
# Images that are prepared at once.
_CHUNK = 256
_GREY, _RGB, _RGBA = 1, 3, 4


class Pixels:
    """Prepares images as the source's image processor does: size, crop, rescaling, mean, std."""

    def __init__(self, processor: Any, channels: int, where: str) -> None:
        """Keep the processor.

        Args:
            processor: a transformers image processor.
            channels: of the model.
            where: the recipe's key and value, for messages.
        """
        self._processor, self._channels, self._where = processor, channels, where

    def __call__(self, images: Images) -> Images:
        """Return the model's inputs.

        Args:
            images: (n, channels, height, width), whole numbers 0 .. 255 scaled to [-1, 1]. Grey
                images are repeated for a model of three channels; of RGBA images it gets RGB.

        Returns:
            (n, channels, height, width) of the model.

        Raises:
            ModelError: the processor cannot take them.
        """
        whole = np.rint((images + 1.0) * 127.5).astype(np.uint8)
        if self._channels == _RGB and whole.shape[1] == _GREY:
            whole = np.repeat(whole, _RGB, axis=1)
        elif self._channels == _RGB and whole.shape[1] == _RGBA:
            whole = whole[:, :_RGB]
        parts = [self._prepared(whole[i : i + _CHUNK]) for i in range(0, len(whole), _CHUNK)]
        return np.concatenate(parts)

    def _prepared(self, images: npt.NDArray[np.uint8]) -> Images:
        try:
            with sources.quiet():
                given = self._processor(
                    images=[*images], input_data_format="channels_first", return_tensors="np"
                )
            found = np.asarray(given["pixel_values"], np.float32)
        except Exception as error:  # processors check their input in many ways
            raise ModelError(
                f"{self._where}: its image processor ({_FILE}) cannot take images of"
                f" {' x '.join(map(str, images.shape[1:]))}: {sources.message(error)}"
            ) from error
        if found.ndim != images.ndim:
            raise ModelError(
                f"{self._where}: expected an image processor ({_FILE}) that gives one image each,"
                f" it gives arrays of {' x '.join(map(str, found.shape[1:]))}"
            )
        return found

    def __str__(self) -> str:
        """Return what is done, in one line."""
        own, told = self._processor, []
        for asked, name in (("do_resize", "size"), ("do_center_crop", "crop_size")):
            if getattr(own, asked, False):
                size = dict(getattr(own, name) or {})
                told.append(f"{name} {', '.join(f'{k} {v}' for k, v in size.items() if v)}")
        if getattr(own, "do_normalize", False):
            for name in ("mean", "std"):
                told.append(f"{name} {', '.join(f'{x:g}' for x in _each(own, f'image_{name}'))}")
        return ", ".join(told) or type(own).__name__


def _each(processor: Any, name: str) -> list[float]:
    return [float(value) for value in np.atleast_1d(getattr(processor, name))]


def pixels_of(model: Model, channels: int) -> Pixels | None:
    """Return what prepares images for a model; None where its source has no image processor.

    Args:
        model: the recipe's section.
        channels: of the model.

    Raises:
        ModelError: the processor cannot be read or used.
    """
    if model.source == "config":
        return None
    where = sources.where(model)
    place = sources.location(model.source)
    if not any(_has(place, name) for name in (_FILE, PROCESSOR_NAME)):
        return None
    if importlib.util.find_spec("PIL") is None:
        raise ModelError(
            f"{where}: need Pillow for its image processor ({_FILE}), which is not installed;"
            " pip install 'rayfed-lora[hub]'"
        )
    try:
        with sources.quiet():
            found = AutoImageProcessor.from_pretrained(
                place, trust_remote_code=False, backend="pil"
            )
    except Exception as error:  # as for configurations
        raise ModelError(
            f"{where}: its image processor ({_FILE}) cannot be read: {sources.message(error)}"
        ) from error
    return Pixels(found, channels, where)


def _has(place: str, name: str) -> bool:
    with sources.quiet():
        found = cached_file(
            place,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return found is not None
