"""Integers of 8 bits with stochastic rounding, a scale a row.

Source: QSGD, arXiv:1610.02132, section 3, with the largest magnitude as the scale of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rayfed_lora.types import FloatArray
from rayfed_lora.wire.update import Shapes, Stacked, update

_LEVELS = np.float32(127.0)


def _rows(shape: tuple[int, ...]) -> int:
    """Return the number of rows of a tensor: the smaller side of it as a matrix.

    >>> _rows((4, 100)), _rows((100, 4)), _rows((7,)), _rows((8, 3, 2, 2))
    (4, 4, 1, 8)
    """
    if len(shape) < 2:
        return 1
    return min(shape[0], math.prod(shape[1:]))


def size(shapes: Shapes) -> int:
    """Return one byte a value and four bytes a row."""
    return sum(math.prod(shape) + 4 * _rows(shape) for shape in shapes.values())


@update("int8", source="1610.02132", stacked=True, size=size)
def int8(tensors: Stacked, rngs: Sequence[np.random.Generator]) -> tuple[Stacked, int]:
    """8 bits a value, rounded at random without bias, and a float32 scale a row.

    With s = max |x| / 127 over a row: q = floor(x / s + u), u uniform in [0, 1), so that
    E[s q] = x. A row runs along the longer side of a tensor as a matrix: of factors, there are as
    many as the rank.
    """
    seen, sent = {}, 0
    for name, x in tensors.items():
        shape = x.shape[1:]
        if x.size == 0:
            # Of a module of rank 0.
            seen[name] = x
            continue
        rows, matrix = _rows(shape), x.reshape(len(x), *(shape[:1] or (1,)), -1)
        across = len(shape) > 1 and rows < shape[0]
        if len(shape) < 2:
            matrix = x.reshape(len(x), 1, -1)
        if across:
            matrix = matrix.transpose(0, 2, 1)
        draws = np.stack([rng.random(matrix.shape[1:], np.float32) for rng in rngs])
        q, scales = _rounded(matrix, draws)
        sent += q[0].nbytes + scales[0].nbytes
        decoded = q * scales[..., None]
        seen[name] = (decoded.transpose(0, 2, 1) if across else decoded).reshape(x.shape)
    return seen, sent


def _rounded(
    x: FloatArray, draws: FloatArray
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.int8]], FloatArray]:
    """Return (clients, rows, values) integers and (clients, rows) scales."""
    scales = np.abs(x).max(axis=2, initial=0.0) / _LEVELS
    # A row whose scale is 0 is all zeros, or too small for float32.
    steps = np.divide(x, scales[..., None], out=np.zeros_like(x), where=scales[..., None] > 0)
    q = np.clip(np.floor(steps + draws), -_LEVELS, _LEVELS)
    q = np.where(scales[..., None] > 0, q, 0)
    return q.astype(np.int8), scales.astype(np.float32)
