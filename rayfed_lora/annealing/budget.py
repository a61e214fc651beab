"""The allocation of a round's parameter budget to the adapted modules.

The budget is the cost of the round's uniform rank. Source: this project (docs/method.md,
"Per-module allocation"); the idea that singular directions compete for a budget is AdaLoRA's,
arXiv:2303.10512.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from rayfed_lora.plugins.tables import ALLOCATIONS
from rayfed_lora.types import ModuleShape

Spectra = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Allocation:
    """A registered allocation: whether it looks at the trained adapter, and its function."""

    needs_spectra: bool
    compute: Callable[..., Mapping[str, int]]


def allocation(name: str | None = None, *, needs_spectra: bool = False) -> Callable[[Any], Any]:
    """Register an allocation: a function of (shapes, rank) that returns the rank of each module.

    `shapes` are the `ModuleShape`s by name, `rank` the round's uniform rank, whose cost, the sum
    of rank * (d_in + d_out), is the budget. With `needs_spectra` the function gets (shapes,
    spectra, rank): the falling singular values of each module's effective update; rounds before a
    trained adapter are then uniform. Keyword-only parameters are its options: keys beside
    `annealing.allocation.name`.

    Args:
        name: value of `annealing.allocation`; default: the function's, with hyphens.
        needs_spectra: whether it looks at the trained adapter.

    Raises:
        PluginError: the name is taken, or an option is not typed.
    """

    def bound(value: Allocation, options: Mapping[str, Any]) -> Allocation:
        return Allocation(value.needs_spectra, partial(value.compute, **options))

    def register(function: Any) -> Any:
        made = Allocation(needs_spectra, function)
        return ALLOCATIONS.add(function, name, value=lambda _: made, bind=bound)

    return register


def checked(found: Any, shapes: Mapping[str, ModuleShape], rank: int) -> dict[str, int]:
    """Return the ranks that an own allocation gives, in the order of the modules.

    Raises:
        ValueError: other modules, a rank that a module cannot have, or more than the budget.
    """
    if not isinstance(found, Mapping) or set(found) != set(shapes):
        raise ValueError(f"expected a rank for each of {', '.join(shapes)}, got {found!r}")
    ranks = {}
    for name, shape in shapes.items():
        own = found[name]
        whole = isinstance(own, (int, np.integer)) and not isinstance(own, bool)
        if not whole or not 0 <= own <= shape.max_rank:
            raise ValueError(f"module {name}: expected a rank 0 to {shape.max_rank}, got {own!r}")
        ranks[name] = int(own)
    budget, asked = cost(shapes, uniform(shapes, rank)), cost(shapes, ranks)
    if asked > budget:
        raise ValueError(f"expected at most the {budget:,} values of rank {rank}, got {asked:,}")
    return ranks


@allocation()
def uniform(shapes: Mapping[str, ModuleShape], rank: int) -> dict[str, int]:
    """Return the same rank >= 0 for every module, at most the largest that the module can have.

    >>> uniform({"q": ModuleShape(4, 4), "v": ModuleShape(4, 2)}, 3)
    {'q': 3, 'v': 2}
    """
    return {name: min(rank, shape.max_rank) for name, shape in shapes.items()}


def cost(shapes: Mapping[str, ModuleShape], ranks: Mapping[str, int]) -> int:
    """Return the number of values in the factors: sum of rank * (d_in + d_out).

    >>> cost({"q": ModuleShape(4, 6)}, {"q": 3})
    30
    """
    return sum(ranks[name] * (shape.d_in + shape.d_out) for name, shape in shapes.items())


@allocation(needs_spectra=True)
def spectral(shapes: Mapping[str, ModuleShape], spectra: Spectra, rank: int) -> dict[str, int]:
    """Spend the budget of uniform `rank` on the directions with most energy per value.

    All singular directions of all modules are sorted by sigma ** 2 / (d_in + d_out); each is taken
    if it still fits. Directions beyond a module's spectrum have energy 0, so that a surplus
    (re-heating) is spread evenly. A module may end at rank 0.

    `spectra` are the singular values of each module's effective update D, falling. The result
    never costs more than uniform `rank`, >= 0.

    >>> shapes = {"q": ModuleShape(4, 4), "v": ModuleShape(4, 4)}
    >>> spectral(shapes, {"q": [3.0, 2.0], "v": [0.1, 0.0]}, rank=1)
    {'q': 2, 'v': 0}
    """
    left = cost(shapes, uniform(shapes, rank))
    candidates = []
    for position, (name, shape) in enumerate(shapes.items()):
        price = shape.d_in + shape.d_out
        sigmas = [*spectra[name], *[0.0] * shape.max_rank][: shape.max_rank]
        candidates += [(-(s * s) / price, i, position, name, price) for i, s in enumerate(sigmas)]
    ranks = dict.fromkeys(shapes, 0)
    full: set[str] = set()
    for _, _, _, name, price in sorted(candidates):
        if price > left:
            full.add(name)
        if name not in full:
            ranks[name] += 1
            left -= price
    return ranks
