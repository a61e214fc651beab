"""The allocation of a round's parameter budget to the adapted modules.

The budget is the cost of the round's uniform rank. Source: this project (docs/method.md,
"Per-module allocation"); the idea that singular directions compete for a budget is AdaLoRA's,
arXiv:2303.10512.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rayfed_lora.types import ModuleShape


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


def spectral(
    shapes: Mapping[str, ModuleShape], spectra: Mapping[str, Sequence[float]], rank: int
) -> dict[str, int]:
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
