"""Who takes part in a round, and in which blocks. Source: this project (method.md)."""

from __future__ import annotations

import math

from rayfed_lora.recipe import Recipe
from rayfed_lora.seeds import Purpose, generator

_BLOCKS_A_ROUND = 64


def cohort(recipe: Recipe, clients: int, round_index: int) -> tuple[int, ...]:
    """Return the clients of a round: drawn uniformly without replacement, in rising order.

    Args:
        recipe: gives the size and the seed.
        clients: number of clients there are.
        round_index: from 0.
    """
    rng = generator(recipe.seed, Purpose.COHORT, round_index)
    drawn = rng.choice(clients, recipe.cohort_size(clients), replace=False, shuffle=False)
    return tuple(sorted(int(client) for client in drawn))


def blocks(cohort: tuple[int, ...], size: int | str) -> list[tuple[int, ...]]:
    """Cut a cohort into blocks of consecutive clients.

    Args:
        cohort: clients of the round.
        size: clients a block, or `auto` for 64 blocks at most; never a matter of how many actors
            there are, so that no result depends on that.

    >>> blocks((1, 4, 5, 9), 3)
    [(1, 4, 5), (9,)]
    """
    step = max(1, math.ceil(len(cohort) / _BLOCKS_A_ROUND)) if isinstance(size, str) else size
    return [cohort[i : i + step] for i in range(0, len(cohort), step)]
