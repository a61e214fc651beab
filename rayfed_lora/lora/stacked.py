"""States of clients that were trained together, one row of values a client.

What is done with all of them then takes as many calls as with one. Source: this project.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TypeVar

import numpy as np

from rayfed_lora.lora.products import Float64Array, WeightedProduct
from rayfed_lora.types import AdapterState, Factors, FloatArray

# Before a module's name; no parameter's name starts so.
A, B = "A of ", "B of "
_T = TypeVar("_T")


def named(state: AdapterState) -> dict[str, FloatArray]:
    """Return all tensors of a state by one name each, the dense ones first."""
    tensors = dict(state.dense)
    for name, f in state.factors.items():
        tensors |= {A + name: f.a, B + name: f.b}
    return tensors


class StackedStates:
    """The states of some clients; that of one is cut out where it is asked for.

    Attributes:
        rows: (clients, values) float32, the tensors of a client one after the other, in the order
            of `named`; lower ranks are padded with zeros.
        likes: of each client, a state with the same modules, names, ranks and scales.
        shapes: of one client's tensors, padded, by `named`.
    """

    def __init__(
        self,
        rows: FloatArray,
        likes: Sequence[AdapterState],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Take the rows over.

        Args:
            rows: (clients, values).
            likes: one a client.
            shapes: their sizes add up to `values`.
        """
        self.rows, self.likes, self.shapes = rows, likes, shapes
        # Whether a row has no padding.
        self.alike = all(like is likes[0] for like in likes)

    @cached_property
    def _places(self) -> dict[str, slice]:
        edges = accumulate(map(math.prod, self.shapes.values()), initial=0)
        return {name: slice(*ends) for name, ends in zip(self.shapes, pairwise(edges), strict=True)}

    def state(self, client: int) -> AdapterState:
        """Return the state of the client at a place; its tensors are parts of `rows`."""
        like = self.likes[client]
        factors = _Cut(self, client, like.factors, self._factors)
        return AdapterState(factors, _Cut(self, client, like.dense, self._tensor))

    def _tensor(self, client: int, name: str) -> FloatArray:
        return self.rows[client, self._places[name]].reshape(self.shapes[name])

    def _factors(self, client: int, name: str) -> Factors:
        like = self.likes[client].factors[name]
        a, b = self._tensor(client, A + name), self._tensor(client, B + name)
        return Factors(a[: like.rank], b[:, : like.rank], like.scale)

    def products(self, clients: Sequence[int], weights: Float64Array) -> dict[str, WeightedProduct]:
        """Return the weighted sum of clients' effective updates, by module; all are `alike`.

        Args:
            clients: their places.
            weights: (len(clients),).
        """
        rows = self._of(clients)
        found = {}
        for name, like in self.likes[0].factors.items():
            (rank, d_in), (d_out, _) = self.shapes[A + name], self.shapes[B + name]
            a, b = rows[:, self._places[A + name]], rows[:, self._places[B + name]]
            columns = b.reshape(len(rows), d_out, rank).transpose(1, 0, 2)
            found[name] = WeightedProduct(
                np.repeat(weights * like.scale, rank),
                columns.reshape(d_out, len(rows) * rank),
                a.reshape(len(rows) * rank, d_in),
            )
        return found

    def values(
        self, clients: Sequence[int], *, dense: bool
    ) -> tuple[FloatArray, dict[str, tuple[int, ...]]]:
        """Return rows of clients that are `alike`, and the shapes of what is in them.

        Args:
            clients: their places.
            dense: only the dense tensors.
        """
        shapes = dict(self.shapes)
        if dense:
            shapes = {name: shapes[name] for name in self.likes[0].dense}
        return self._of(clients)[:, : sum(map(math.prod, shapes.values()))], shapes

    def _of(self, clients: Sequence[int]) -> FloatArray:
        return self.rows if list(clients) == [*range(len(self.rows))] else self.rows[list(clients)]


def together(states: Sequence[AdapterState]) -> tuple[StackedStates, list[int]] | None:
    """Return the stack that holds all these states, and their places; None if there is none.

    None too where modules, ranks or scales differ inside the stack, and where any state is not
    exactly one client's row, e.g. after `dataclasses.replace(state, factors=...)`.
    """
    cuts = [_whole(state) for state in states]
    if not cuts or cuts[0] is None or not cuts[0].stack.alike:
        return None
    stack = cuts[0].stack
    places = [cut.client for cut in cuts if cut is not None and cut.stack is stack]
    return (stack, places) if len(places) == len(cuts) else None


def _whole(state: AdapterState) -> _Cut[FloatArray] | None:
    """Return the cut of a state whose factors and dense tensors are the same client's row."""
    factors, dense = state.factors, state.dense
    if not isinstance(factors, _Cut) or not isinstance(dense, _Cut):
        return None
    like = dense.stack.likes[dense.client]
    same = factors.stack is dense.stack and factors.client == dense.client
    return dense if same and factors.of(like.factors) and dense.of(like.dense) else None


class _Cut(Mapping[str, _T]):
    """What one client has in a stack, by name."""

    def __init__(
        self,
        stack: StackedStates,
        client: int,
        like: Mapping[str, object],
        cut: Callable[[int, str], _T],
    ) -> None:
        self.stack, self.client = stack, client
        self._like, self._cut = like, cut

    def of(self, like: Mapping[str, object]) -> bool:
        """Return whether this is the part of the client's row that `like` names."""
        return self._like is like

    def __getitem__(self, name: str) -> _T:
        if name not in self._like:
            raise KeyError(name)
        return self._cut(self.client, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)

    def __reduce__(self) -> tuple[type, tuple[dict[str, _T]]]:
        # Of its own only: not the whole stack.
        return dict, (dict(self),)
