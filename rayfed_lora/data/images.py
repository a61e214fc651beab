"""Image columns of every form, converted to float tensors."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfed_lora.data.columns import reject_nulls
from rayfed_lora.data.naming import is_number
from rayfed_lora.data.place import Place
from rayfed_lora.errors import DataError

_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
# Pillow's modes of at most 8 bits a channel; converting other modes clips their values.
_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_LISTS = (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)


def as_tensors(
    column: pa.ChunkedArray, where: Place, size: int | None = None
) -> pa.FixedShapeTensorArray:
    """Return images as float32 tensors (channels, height, width), all of one size.

    Whole numbers 0 .. 255 become x / 127.5 - 1; floats are kept unscaled. Images are tensors or
    nested lists H x W, H x W x C or C x H x W with 1, 3 or 4 channels, or encoded (binary, or a
    struct with the field `bytes`). Encoded images are scaled and cropped to `size` x `size`, if it
    is given; nothing else is resized.

    Raises:
        DataError: another type, images of several sizes, a missing or undecodable image, more than
            8 bits a channel, encoded images without Pillow, or a `size` for others.
    """
    reject_nulls(column, where)
    array = column.combine_chunks()
    encoded = None
    if isinstance(array, pa.FixedShapeTensorArray):
        pixels = array.to_numpy_ndarray()
    else:
        storage = array.storage if isinstance(array, pa.ExtensionArray) else array
        encoded = _encoded(storage, where)
        pixels = _stack(storage, where) if encoded is None else _decode(encoded, where, size)
    if size is not None and encoded is None:
        raise DataError(
            f"{where}: need encoded images or paths of images for data.resize, got {array.type}"
        )
    if encoded is None:
        pixels = _channels_first(pixels, where)
    scaled = _scale(pixels, where)
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(scaled))


def are_floats(kind: pa.DataType) -> bool:
    """Return whether the pixels of an image column are floats, which stay unscaled."""
    if isinstance(kind, pa.BaseExtensionType):
        return are_floats(kind.storage_type)
    if pa.types.is_nested(kind) and not pa.types.is_struct(kind):
        return are_floats(kind.value_type)
    return bool(pa.types.is_floating(kind))


def _encoded(array: pa.Array, where: Place) -> pa.Array | None:
    if pa.types.is_struct(array.type) and array.type.get_field_index("bytes") >= 0:
        encoded = pc.struct_field(array, "bytes")
        reject_nulls(encoded, where.inside("field 'bytes'"))
        return encoded
    binary = pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type)
    return array if binary else None


def _stack(array: pa.Array, where: Place) -> npt.NDArray[Any]:
    """Turn nested lists of equal lengths into one array, level by level."""
    shape = [len(array)]
    while len(array) > 0 and isinstance(array, _LISTS):
        if array.null_count > 0:
            raise DataError(f"{where}: need pixels, got null inside an image")
        lengths = pc.list_value_length(array).to_numpy()
        odd = np.flatnonzero(lengths != lengths[0])
        if len(odd) > 0:
            row = int(odd[0]) // math.prod(shape[1:])
            raise DataError(
                f"{where}: need images of one size, got lists of {lengths[0]} and"
                f" {lengths[odd[0]]} numbers or lists, the latter in {where.row(row)}"
            )
        shape.append(int(lengths[0]))
        array = array.flatten()
    if not is_number(array.type):
        raise DataError(
            f"{where}: need an image as nested lists of numbers or as encoded bytes,"
            f" got {array.type} after {len(shape) - 1} levels of lists"
        )
    if array.null_count > 0:
        raise DataError(f"{where}: need pixels, got null inside an image")
    return np.asarray(array.to_numpy(zero_copy_only=False)).reshape(shape)


def _decode(encoded: pa.Array, where: Place, size: int | None) -> npt.NDArray[np.uint8]:
    """Decode with Pillow: grey where all images are, else RGB; see `as_tensors`.

    Channels come first.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError(
            f"{where}: need Pillow to decode images, which is not installed;"
            " pip install 'rayfed-lora[hub]'"
        ) from error
    images = []
    for row, content in enumerate(encoded):
        try:
            image = Image.open(io.BytesIO(content.as_py()))
            image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{where}: need an image in {where.row(row)}, got {error}") from error
        if image.mode not in _EIGHT_BITS:
            raise DataError(
                f"{where}: need images of 8 bits a channel, got mode {image.mode!r} in"
                f" {where.row(row)};"
                " convert them first, or give their pixels as lists of floats"
            )
        image = image if image.mode == "L" else image.convert("RGB")
        images.append(image if size is None else ImageOps.fit(image, (size, size)))
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise DataError(
            f"{where}: need images of one size, got {len(sizes)} sizes, among them"
            f" {sizes[0]} and {sizes[-1]}; data.resize scales and crops them to one"
        )
    grey = all(image.mode == "L" for image in images)
    if grey:
        return np.stack([np.asarray(image) for image in images])[:, np.newaxis]
    return np.moveaxis(np.stack([np.asarray(image.convert("RGB")) for image in images]), -1, 1)


def _channels_first(pixels: npt.NDArray[Any], where: Place) -> npt.NDArray[Any]:
    shape = pixels.shape[1:]
    if 0 not in shape and len(shape) == 2:
        return pixels[:, np.newaxis]
    if 0 not in shape and len(shape) == 3:
        first, last = shape[0] in _CHANNELS, shape[-1] in _CHANNELS
        if first != last:
            return pixels if first else np.moveaxis(pixels, -1, 1)
    got = " x ".join(map(str, shape)) or "single numbers"
    raise DataError(
        f"{where}: need images H x W, H x W x C or C x H x W, where exactly one of the first and"
        f" the last size is a number of channels {_CHANNELS}, got {got}"
    )


def _scale(pixels: npt.NDArray[Any], where: Place) -> npt.NDArray[np.float32]:
    scaled = pixels.astype(np.float32)
    if np.issubdtype(pixels.dtype, np.floating):
        if not np.isfinite(scaled).all():
            raise DataError(f"{where}: need finite pixels, got nan or infinity")
        return scaled
    if pixels.min() < 0 or pixels.max() > 255:
        raise DataError(
            f"{where}: need whole pixels from 0 to 255, got {pixels.min()} to {pixels.max()}"
        )
    scaled /= 127.5
    scaled -= 1.0
    return scaled
