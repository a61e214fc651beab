"""Floating point of 32 and of 16 bits. Source: IEEE 754; bfloat16: arXiv:1905.12322."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rayfed_lora.types import FloatArray
from rayfed_lora.wire.update import Shapes, Stacked, update

_LARGEST = float(np.finfo(np.float16).max)


def two_bytes_a_value(shapes: Shapes) -> int:
    """Return the bytes of a message with two bytes a value."""
    return 2 * sum(map(math.prod, shapes.values()))


@update("float32", stacked=True, lossless=True, size=lambda shapes: 2 * two_bytes_a_value(shapes))
def float32(tensors: Stacked, rngs: Sequence[np.random.Generator]) -> tuple[Stacked, int]:
    """The values themselves: four bytes each, no arithmetic."""
    del rngs
    return tensors, sum(tensor[0].nbytes for tensor in tensors.values())


@update("float16", stacked=True, size=two_bytes_a_value)
def float16(tensors: Stacked, rngs: Sequence[np.random.Generator]) -> tuple[Stacked, int]:
    """Rounded to 16 bits, to the nearest; values beyond 65504 become 65504."""
    del rngs
    sent = {n: np.clip(x, -_LARGEST, _LARGEST).astype(np.float16) for n, x in tensors.items()}
    return {n: x.astype(np.float32) for n, x in sent.items()}, _bytes(sent)


@update("bfloat16", source="1905.12322", stacked=True, size=two_bytes_a_value)
def bfloat16(tensors: Stacked, rngs: Sequence[np.random.Generator]) -> tuple[Stacked, int]:
    """Rounded to the first 16 bits of a float32, to the nearest, ties to even."""
    del rngs
    sent = {name: _upper_half(x) for name, x in tensors.items()}
    seen: dict[str, FloatArray] = {
        name: (half.astype(np.uint32) << 16).view(np.float32) for name, half in sent.items()
    }
    return seen, _bytes(sent)


def _upper_half(x: FloatArray) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    bits = np.ascontiguousarray(x).view(np.uint32)
    # The last kept bit breaks ties.
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def _bytes(sent: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]) -> int:
    """Return the bytes of one client's arrays."""
    return sum(array[0].nbytes for array in sent.values())
