"""The cohort of a round and its blocks (docs/method.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.tasks.messages import Block
from rayfed_lora.types import Device, ModelShape
from rayfed_lora.wire.upload import malicious_clients

_TESTED_TOGETHER = 50
# Minimum number of blocks of a round that has so many clients.
_BLOCKS_TO_SHARE = 4
_FEW_BLOCKS = 8
# Memory that training holds per linear layer, in sizes of its output (gradients, attention, norms).
_HELD_PER_LINEAR_OUTPUT = 3


@dataclass(frozen=True)
class _BlockLimits:
    """The size of a block up to which it trains faster than smaller ones, on a kind of device.

    Attributes:
        linear_flops: work of one call of a linear layer that outweighs the cost of a call.
        activation_bytes: largest memory of a block.
        clients: largest number of clients.
    """

    linear_flops: float
    activation_bytes: float
    clients: int


# Measured: benchmarks/README.md. A GPU's are estimates from its launch time and speed.
_LIMITS: Mapping[Device, _BlockLimits] = {
    "cpu": _BlockLimits(linear_flops=8e7, activation_bytes=1e9, clients=32),
    "cuda": _BlockLimits(linear_flops=1e10, activation_bytes=8e9, clients=64),
}


@dataclass(frozen=True)
class BlockSize:
    """How a cohort is cut.

    Attributes:
        clients: maximum number of clients per block.
        even: the sizes of blocks differ by at most one; else only the last block is smaller.
        reason: for the user.
    """

    clients: int
    even: bool
    reason: str = ""


def cohort(
    recipe: Recipe,
    clients: int,
    round_index: int,
    reachable: npt.NDArray[np.int64] | None = None,
) -> tuple[int, ...]:
    """Return the clients of a round: drawn uniformly without replacement, in rising order.

    With Poisson sampling (`privacy.sampling`) each client is drawn by itself: there may be none.

    Args:
        recipe: gives the size and the seed.
        clients: number of all clients.
        round_index: from 0.
        reachable: clients that can be drawn, all of them where there are too few; None: all.
    """
    rng = generator(recipe.seed, Purpose.COHORT, round_index)
    wanted = recipe.drawn(clients)
    if recipe.privacy is not None and recipe.privacy.sampling == "poisson":
        there = rng.random(clients) < recipe.cohort_size(clients) / clients
        return tuple(np.flatnonzero(there).tolist())
    if reachable is None:
        drawn = rng.choice(clients, wanted, replace=False, shuffle=False)
    else:
        drawn = rng.choice(reachable, min(wanted, len(reachable)), replace=False, shuffle=False)
    return tuple(sorted(int(client) for client in drawn))


def attackers(recipe: Recipe, clients: int) -> frozenset[int]:
    """Return the ids of the malicious ones of a run's clients."""
    attack = recipe.clients.attack
    share = 0.0 if attack is None else attack.share
    return frozenset(malicious_clients(recipe.seed, share, clients).tolist())


def tested_clients(recipe: Recipe, clients: int, round_index: int) -> list[Block]:
    """Return which of `clients` are tested on their own examples after a round, in blocks."""
    wanted = recipe.evaluation.clients
    chosen = np.arange(clients)
    if wanted != "all" and wanted < clients:
        rng = generator(recipe.seed, Purpose.TESTED_CLIENTS, round_index)
        chosen = np.sort(rng.choice(clients, wanted, replace=False))
    return blocks(tuple(chosen.tolist()), BlockSize(_TESTED_TOGETHER, even=False))


def rank_limits(recipe: Recipe, clients: int) -> npt.NDArray[np.int64] | None:
    """Return the largest rank that each client can train, (clients,); None where none is limited.

    `clients.ranks` lists ranks in turn, or maps each rank to its share of clients, drawn at random.
    """
    wanted = recipe.clients.ranks
    if wanted is None:
        return None
    if isinstance(wanted, Mapping):
        # In order of the ranks: how a recipe lists them changes nothing.
        ranks, shares = (np.array(part) for part in zip(*sorted(wanted.items()), strict=True))
        rng = generator(recipe.seed, Purpose.RANKS)
        return rng.choice(ranks, clients, p=shares / shares.sum()).astype(np.int64)
    return np.resize(np.atleast_1d(np.array(wanted, np.int64)), clients)


def blocks(cohort: tuple[int, ...], size: BlockSize) -> list[Block]:
    """Cut a cohort into blocks of consecutive clients.

    >>> blocks((1, 4, 5, 9), BlockSize(3, even=False))
    [(1, 4, 5), (9,)]
    >>> blocks((1, 4, 5, 9), BlockSize(3, even=True))
    [(1, 4), (5, 9)]
    """
    if not cohort:
        return []
    count = math.ceil(len(cohort) / size.clients)
    if not size.even:
        return [cohort[i * size.clients : (i + 1) * size.clients] for i in range(count)]
    edges = [i * len(cohort) // count for i in range(count + 1)]
    return [cohort[low:high] for low, high in pairwise(edges)]


def block_size(recipe: Recipe, shape: ModelShape, clients: int, device: Device) -> BlockSize:
    """Return how many clients of a cohort of `clients` are trained together, and why.

    `runtime.cohort_size` or, with `auto`, as many as give each linear layer enough work in one step
    to outweigh the cost of a call, as far as their activations fit, and no more than leave a few
    blocks for several actors to share. A full-model round trains one client at a time.
    """
    wanted = recipe.runtime.cohort_size
    if shape.obstacle is not None:
        return BlockSize(1, True, f"one client at a time: {shape.obstacle}")
    if not isinstance(wanted, str):
        return BlockSize(wanted, False, f"{wanted} clients a block (runtime.cohort_size)")
    if shape.linear_flops == 0:
        return BlockSize(1, True, "one client at a time: the model's work could not be traced")
    batch, limits = recipe.clients.batch_size, _LIMITS[device]
    work = shape.linear_flops * batch
    by_work = math.ceil(limits.linear_flops / work)
    held = _HELD_PER_LINEAR_OUTPUT * shape.activation_bytes * batch
    by_memory = max(1, math.floor(limits.activation_bytes / held))
    most = min(by_work, by_memory, limits.clients)
    fitting, shared = math.ceil(clients / most), min(clients, _BLOCKS_TO_SHARE)
    count = max(fitting, shared)
    if count < clients and count <= _FEW_BLOCKS:
        # A power of two: the usual numbers of actors then have equally many blocks each.
        count = min(clients, 2 ** math.ceil(math.log2(count)))
    size = math.ceil(clients / count)
    reason = (
        f"{size} client{'s' * (size > 1)} a block on a {'CPU' if device == 'cpu' else 'GPU'}; one"
        f" client's step gives a linear layer {work / 1e6:.3g} MFLOP (a call is worth"
        f" {limits.linear_flops / 1e6:.3g}) and holds about {held / 1e6:.3g} MB (a block may hold"
        f" {limits.activation_bytes / 1e6:.4g})"
    )
    if fitting < shared:
        reason += (
            f"; {shared} blocks a round for actors to share: with fewer of them, larger blocks"
            " (runtime.cohort_size) can be quicker"
        )
    return BlockSize(size, True, reason)
