"""One client's examples, cut into the batches of one round. Source: this project."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

IndexArray = npt.NDArray[np.int64]


def batch_indices(
    examples: IndexArray,
    batch_size: int,
    rng: np.random.Generator,
    *,
    steps: int | None = None,
    epochs: int | None = None,
) -> list[IndexArray]:
    """Cut fresh permutations of a client's examples into batches.

    With b = min(batch_size, len(examples)): `steps` gives that many batches of exactly b, cut from
    one stream of permutations (a batch may span two of them); `epochs` permutes the examples anew
    for each pass and cuts every pass by itself, its last batch smaller where b does not divide it.

    Args:
        examples: (n,) row indices, n > 0.
        batch_size: examples a batch, > 0.
        rng: the stream of this client and round.
        steps: number of batches, > 0.
        epochs: number of passes, > 0; exactly one of `steps` and `epochs` is given.

    Returns:
        The batches in training order, each an array of entries of `examples`.

    Raises:
        ValueError: an argument is out of its range.

    >>> batches = batch_indices(np.arange(5), 2, np.random.default_rng(0), epochs=1)
    >>> [len(batch) for batch in batches]
    [2, 2, 1]
    """
    if len(examples) == 0:
        raise ValueError("need at least one example, got an empty client")
    if batch_size <= 0:
        raise ValueError(f"need batch_size > 0, got {batch_size}")
    if (steps is None) == (epochs is None):
        raise ValueError(f"need one of steps and epochs, got steps={steps}, epochs={epochs}")
    size = min(batch_size, len(examples))
    if steps is not None:
        if steps <= 0:
            raise ValueError(f"need steps > 0, got {steps}")
        passes = math.ceil(steps * size / len(examples))
        stream = np.concatenate([rng.permutation(examples) for _ in range(passes)])
        return _cut(stream[: steps * size], size)
    if epochs is None or epochs <= 0:
        raise ValueError(f"need epochs > 0, got {epochs}")
    return [batch for _ in range(epochs) for batch in _cut(rng.permutation(examples), size)]


def _cut(stream: IndexArray, size: int) -> list[IndexArray]:
    return [stream[start : start + size] for start in range(0, len(stream), size)]
