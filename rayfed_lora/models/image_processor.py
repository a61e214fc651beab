"""Preprocessing of images by the image processor of a model's source. Source: this project."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoImageProcessor
from transformers.image_utils import SizeDict
from transformers.utils import PROCESSOR_NAME, cached_file

from rayfed_lora.errors import ModelError
from rayfed_lora.models import base_models
from rayfed_lora.models.quiet import quiet
from rayfed_lora.models.wording import one_line, where
from rayfed_lora.recipe.model import Model

Images = npt.NDArray[np.float32]
_FILE = "preprocessor_config.json"
_SILENT = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
# Key of the image part in the file of a processor for several kinds of input.
_IMAGE_PART = "image_processor"
# Packages to install for what some processors import; timm's processor needs torchvision, too.
_OPTIONAL = {"timm": "timm torchvision", "torchvision": "torchvision"}
# Images processed at once.
_CHUNK = 256


class ImageProcessor:
    """Preprocesses images as the source's processor does: size, crop, rescaling, mean, std."""

    def __init__(self, processor: Any, channels: int, name: str) -> None:
        """Keep a transformers processor, the model's channels, and a name for messages."""
        self._processor, self._channels, self._name = processor, channels, name

    def __call__(self, images: Images) -> Images:
        """Return the model's inputs for images, both (n, channels, height, width).

        The pixels of the images are integers 0 .. 255 scaled to [-1, 1]. For a model of three
        channels, grey images are repeated and the alpha of RGBA is dropped.

        Raises:
            ModelError: the processor cannot process them.
        """
        first = self._process(images[:_CHUNK])
        inputs = np.empty((len(images), *first.shape[1:]), np.float32)
        inputs[:_CHUNK] = first
        for i in range(_CHUNK, len(images), _CHUNK):
            inputs[i : i + _CHUNK] = self._process(images[i : i + _CHUNK])
        return inputs

    def _process(self, scaled: Images) -> Images:
        images = np.rint((scaled + 1.0) * 127.5).astype(np.uint8)
        if self._channels == 3 and images.shape[1] == 1:
            images = np.repeat(images, 3, axis=1)
        elif self._channels == 3 and images.shape[1] == 4:
            images = images[:, :3]
        sizes = " x ".join(map(str, images.shape[1:]))
        with base_models.attributed(f"{self._name} cannot take images of {sizes}"):
            output = self._processor(
                images=[*images], input_data_format="channels_first", return_tensors="np"
            )
            inputs = np.asarray(output["pixel_values"], np.float32)
        if inputs.ndim != images.ndim:
            raise ModelError(
                f"{self._name}: expected one image for each, it gives arrays of"
                f" {' x '.join(map(str, inputs.shape[1:]))}"
            )
        return inputs

    def write(self, folder: Path) -> None:
        """Write the processor's file into a folder."""
        self._processor.save_pretrained(str(folder))

    def __str__(self) -> str:
        """Return the steps of the preprocessing, in one line."""
        own, steps = self._processor, []
        for switch, name in (("do_resize", "size"), ("do_center_crop", "crop_size")):
            if getattr(own, switch, False):
                size = dict(getattr(own, name) or {})
                steps.append(f"{name} {', '.join(f'{k} {v}' for k, v in size.items() if v)}")
        if getattr(own, "do_normalize", False):
            for name in ("mean", "std"):
                values = np.atleast_1d(getattr(own, f"image_{name}"))
                steps.append(f"{name} {', '.join(f'{float(x):g}' for x in values)}")
        return ", ".join(steps) or type(own).__name__


def read_image_processor(
    model: Model, channels: int, size: int | None = None
) -> ImageProcessor | None:
    """Return the image processor of a model's source; None where there is none.

    `size` is the height and width of the model's inputs; None: the processor's own.

    Raises:
        ModelError: the processor cannot be read or used.
    """
    if model.source == "config":
        return None
    place = base_models.location(model.source)
    file = next(filter(partial(_is_processor, place), (_FILE, PROCESSOR_NAME)), None)
    if file is None:
        return None
    if importlib.util.find_spec("PIL") is None:
        raise ModelError(
            f"{where(model)}: need Pillow for its image processor ({file}), which is not installed;"
            " pip install 'rayfed-lora[hub]'"
        )
    name = f"{where(model)}: its image processor ({file})"
    load = partial(AutoImageProcessor.from_pretrained, trust_remote_code=False, backend="pil")
    try:
        with quiet():
            processor = load(place)
    except Exception as error:  # of many types
        raise ModelError(f"{name} cannot be read: {one_line(error)}{_to_install(error)}") from error
    if size is not None:
        _set_size(processor, size)
    return ImageProcessor(processor, channels, name)


def write_image_processor(folder: Path, model: Model, config: Any, float_pixels: bool) -> None:
    """Write the image processor of a model, as it is used in training.

    Without one, RGB images are scaled to [-1, 1]. Nothing is written for pixels that are given as
    floats, since these are kept, nor for other channels, which no processor of transformers makes.

    Raises:
        ModelError: it cannot be read.
    """
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    own_size = size if "image_size" in model.config and isinstance(size, int) else None
    processor = None if float_pixels else read_image_processor(model, channels, own_size)
    if processor is not None:
        processor.write(folder)
    elif not float_pixels and channels == 3 and isinstance(size, int):
        half, square = [0.5] * channels, {"height": size, "width": size}
        scaled: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": square}
        scaled |= {"image_mean": half, "image_std": half}
        (folder / _FILE).write_text(json.dumps(scaled, indent=1))


def _set_size(processor: Any, size: int) -> None:
    """Set a square output; a processor that resizes by the shorter side still does."""
    square = SizeDict(height=size, width=size)
    if getattr(processor, "size", None):
        by_shorter_side = processor.size.shortest_edge is not None
        processor.size = SizeDict(shortest_edge=size) if by_shorter_side else square
    if getattr(processor, "crop_size", None):
        processor.crop_size = square


def _to_install(error: Exception) -> str:
    """Return what to install where the code of a processor cannot be imported."""
    text = str(error).lower()
    if "import" not in text and not isinstance(error, ImportError):
        return ""
    for package, command in _OPTIONAL.items():
        if package in text and importlib.util.find_spec(package) is None:
            return f"; pip install {command}"
    return ""


def _is_processor(place: str, name: str) -> bool:
    """Return whether a file of a source describes an image processor."""
    silent = dict.fromkeys(_SILENT, False)
    with quiet():
        path = cached_file(place, name, **silent)
    if path is None or name == _FILE:
        return path is not None
    # Processors of text or sound use the second name, too.
    try:
        return _IMAGE_PART in json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:  # reported when the processor is read
        return True
