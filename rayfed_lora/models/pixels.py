"""Images as the source of a model prepares them: its own image processor.

Source: this project, on transformers' image processors.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoImageProcessor
from transformers.image_utils import SizeDict
from transformers.utils import PROCESSOR_NAME, cached_file

from rayfed_lora.errors import ModelError
from rayfed_lora.models import sources
from rayfed_lora.recipe.model import Model

Images = npt.NDArray[np.float32]
_FILE = "preprocessor_config.json"
# Of a processor for several kinds of input, what is said of images.
_PART = "image_processor"
# Packages that some processors need, the one that needs the other first.
_OPTIONAL = ("timm", "torchvision")
# Images that are prepared at once.
_CHUNK = 256
_GREY, _RGB, _RGBA = 1, 3, 4


class Pixels:
    """Prepares images as the source's image processor does: size, crop, rescaling, mean, std."""

    def __init__(self, processor: Any, channels: int, where: str, file: str) -> None:
        """Keep the processor.

        Args:
            processor: a transformers image processor.
            channels: of the model.
            where: the recipe's key and value, for messages.
            file: name of the file that describes the processor, for messages.
        """
        self._processor, self._channels = processor, channels
        self._where, self._file = where, file

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
        first = self._prepared(images[:_CHUNK])
        found = np.empty((len(images), *first.shape[1:]), np.float32)
        found[:_CHUNK] = first
        for i in range(_CHUNK, len(images), _CHUNK):
            found[i : i + _CHUNK] = self._prepared(images[i : i + _CHUNK])
        return found

    def _prepared(self, scaled: Images) -> Images:
        images = np.rint((scaled + 1.0) * 127.5).astype(np.uint8)
        if self._channels == _RGB and images.shape[1] == _GREY:
            images = np.repeat(images, _RGB, axis=1)
        elif self._channels == _RGB and images.shape[1] == _RGBA:
            images = images[:, :_RGB]
        try:
            with sources.quiet():
                given = self._processor(
                    images=[*images], input_data_format="channels_first", return_tensors="np"
                )
            found = np.asarray(given["pixel_values"], np.float32)
        except Exception as error:  # processors check their input in many ways
            raise ModelError(
                f"{self._where}: its image processor ({self._file}) cannot take images of"
                f" {' x '.join(map(str, images.shape[1:]))}: {sources.message(error)}"
            ) from error
        if found.ndim != images.ndim:
            raise ModelError(
                f"{self._where}: expected an image processor ({self._file}) that gives one image"
                f" each, it gives arrays of {' x '.join(map(str, found.shape[1:]))}"
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


def pixels_of(model: Model, channels: int, size: int | None = None) -> Pixels | None:
    """Return what prepares images for a model; None where its source has no image processor.

    Args:
        model: the recipe's section.
        channels: of the model.
        size: height and width to prepare images in; None: the processor's own.

    Raises:
        ModelError: the processor cannot be read or used.
    """
    if model.source == "config":
        return None
    where = sources.where(model)
    place = sources.location(model.source)
    file = _file(place)
    if file is None:
        return None
    if importlib.util.find_spec("PIL") is None:
        raise ModelError(
            f"{where}: need Pillow for its image processor ({file}), which is not installed;"
            " pip install 'rayfed-lora[hub]'"
        )
    try:
        with sources.quiet():
            found = AutoImageProcessor.from_pretrained(
                place, trust_remote_code=False, backend="pil"
            )
    except Exception as error:  # as for configurations
        raise ModelError(
            f"{where}: its image processor ({file}) cannot be read: {sources.message(error)}"
            f"{_to_install(error)}"
        ) from error
    if size is not None:
        _set_size(found, size)
    return Pixels(found, channels, where, file)


def _set_size(processor: Any, size: int) -> None:
    """Let a processor resize and crop to a square; one that resizes by the shorter side still does.

    Args:
        processor: changed in place.
        size: height and width.
    """
    square = SizeDict(height=size, width=size)
    if getattr(processor, "size", None):
        shorter = processor.size.shortest_edge is not None
        processor.size = SizeDict(shortest_edge=size) if shorter else square
    if getattr(processor, "crop_size", None):
        processor.crop_size = square


def _to_install(error: Exception) -> str:
    """Return what to install where a processor's code cannot be imported without it."""
    said = str(error).lower()
    if "import" not in said and not isinstance(error, ImportError):
        return ""
    # transformers says of timm's processor only that it cannot be imported.
    needs = [name for name in _OPTIONAL if name in said and importlib.util.find_spec(name) is None]
    packages = {"timm": "timm torchvision"}
    return f"; pip install {packages.get(needs[0], needs[0])}" if needs else ""


def _file(place: str) -> str | None:
    """Return the name of the file that describes an image processor; None: there is none."""
    for name in (_FILE, PROCESSOR_NAME):
        with sources.quiet():
            found = cached_file(
                place,
                name,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        # A processor of text or sound has a file of this name too.
        if found is not None and (name == _FILE or _describes_images(Path(found))):
            return name
    return None


def _describes_images(file: Path) -> bool:
    try:
        return _PART in json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # what is wrong with it is told when it is read
        return True
