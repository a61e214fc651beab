"""Every client's tensors, for rules that look at each of them. Source: this project."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayfed_lora.types import FloatArray

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ClientUpdates:
    """The trained tensors of the clients of a round, in the order of the cohort.

    Attributes:
        clients: (n,) client ids, from 0.
        weights: (n,) what each counts, > 0; by default its number of examples.
        tensors: (n, ...) float32 by name: `A of <module>`, `B of <module>`, and the parameters
            that are trained densely.
    """

    clients: npt.NDArray[np.int64]
    weights: Float64Array
    tensors: Mapping[str, FloatArray]

    def __len__(self) -> int:
        return len(self.weights)

    def mean(self, weights: npt.ArrayLike | None = None) -> dict[str, Float64Array]:
        """Return the weighted mean of each tensor; default: by `weights`."""
        w = np.asarray(self.weights if weights is None else weights, np.float64)
        return {n: np.tensordot(w / w.sum(), t, 1) for n, t in self.tensors.items()}


class EachUpdate:
    """Every client's tensors, as rows of values."""

    def __init__(self) -> None:
        self._clients: list[int] = []
        self._weights: list[Float64Array] = []
        self._rows: list[FloatArray] = []
        self._shapes: dict[str, tuple[int, ...]] = {}

    def add(
        self,
        clients: Sequence[int],
        weights: Float64Array,
        rows: FloatArray,
        shapes: dict[str, tuple[int, ...]],
    ) -> None:
        """Add clients in order; arguments as for `TensorMean.add_rows`."""
        self._clients += clients
        self._weights.append(weights)
        self._rows.append(rows)
        self._shapes = shapes

    def join(self, other: EachUpdate) -> None:
        """Add the clients of another one."""
        self._clients += other._clients
        self._weights += other._weights
        self._rows += other._rows
        self._shapes = other._shapes or self._shapes

    def all(self) -> ClientUpdates:
        """Return the clients' tensors by name."""
        rows = np.concatenate(self._rows)
        edges = np.cumsum([math.prod(shape) for shape in self._shapes.values()])[:-1]
        parts = np.split(rows, edges, axis=1)
        tensors = {
            name: part.reshape(len(rows), *shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }
        return ClientUpdates(
            np.array(self._clients, np.int64), np.concatenate(self._weights), tensors
        )
