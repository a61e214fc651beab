"""States of clients that were trained together, one row of values a client.

An operation on all of them takes as many calls as on one. Source: this project.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import overload

import numpy as np

from rayfed_lora.lora.products import Float64Array, WeightedProduct
from rayfed_lora.types import AdapterState, Factors, FloatArray

# Prefixes of module names; no parameter's name starts so.
A, B = "A of ", "B of "


def named(state: AdapterState) -> dict[str, FloatArray]:
    """Return all tensors of a state by one name each, the dense ones first."""
    tensors = dict(state.dense)
    for name, f in state.factors.items():
        tensors |= {A + name: f.a, B + name: f.b}
    return tensors


@dataclass(frozen=True, eq=False)
class StackedStates(Sequence[AdapterState]):
    """The states of some clients, in order.

    Attributes:
        rows: (clients, values) float32, the tensors of a client one after the other, in the order
            of `named`; lower ranks are padded with zeros.
        likes: of each client, a state with the same modules, names, ranks and scales.
        shapes: of one client's tensors, padded, by `named`; their sizes add up to `values`.
    """

    rows: FloatArray
    likes: Sequence[AdapterState]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def alike(self) -> bool:
        """Whether all clients have the same ranks and scales."""
        return all(like.version == self.likes[0].version for like in self.likes)

    def taken(self, places: Sequence[int]) -> StackedStates:
        """Return the states of the clients at some places, in that order."""
        if list(places) == [*range(len(self.rows))]:
            return self
        likes = [self.likes[place] for place in places]
        return StackedStates(self.rows[list(places)], likes, self.shapes)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, client: int) -> AdapterState: ...
    @overload
    def __getitem__(self, client: slice) -> StackedStates: ...
    def __getitem__(self, client: int | slice) -> AdapterState | StackedStates:
        if isinstance(client, slice):
            return self.taken(range(*client.indices(len(self))))
        like = self.likes[client]
        factors = {}
        for name, f in like.factors.items():
            a, b = self._tensor(client, A + name), self._tensor(client, B + name)
            factors[name] = Factors(a[: f.rank], b[:, : f.rank], f.scale)
        return AdapterState(factors, {name: self._tensor(client, name) for name in like.dense})

    @cached_property
    def _places(self) -> dict[str, slice]:
        edges = accumulate(map(math.prod, self.shapes.values()), initial=0)
        return {name: slice(*ends) for name, ends in zip(self.shapes, pairwise(edges), strict=True)}

    def _tensor(self, client: int, name: str) -> FloatArray:
        return self.rows[client, self._places[name]].reshape(self.shapes[name])

    def products(self, weights: Float64Array) -> dict[str, WeightedProduct]:
        """Return the clients' effective updates, summed with weights (clients,), by module.

        All clients are `alike`.
        """
        found = {}
        for name, like in self.likes[0].factors.items():
            (rank, d_in), (d_out, _) = self.shapes[A + name], self.shapes[B + name]
            a, b = self.rows[:, self._places[A + name]], self.rows[:, self._places[B + name]]
            columns = b.reshape(len(self), d_out, rank).transpose(1, 0, 2)
            found[name] = WeightedProduct(
                np.repeat(weights * like.scale, rank),
                columns.reshape(d_out, len(self) * rank),
                a.reshape(len(self) * rank, d_in),
            )
        return found

    def values(self, *, dense: bool) -> tuple[FloatArray, dict[str, tuple[int, ...]]]:
        """Return the rows of the values, or of the dense ones alone, and the shapes in them.

        All clients are `alike`.
        """
        names = self.likes[0].dense if dense else self.shapes
        shapes = {name: self.shapes[name] for name in names}
        return self.rows[:, : sum(map(math.prod, shapes.values()))], shapes
