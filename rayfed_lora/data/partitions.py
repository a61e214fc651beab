"""How examples are dealt to clients: one decorated function for each kind of partition.

Source: label skew by Dirichlet, Hsu et al. 2019, arXiv:1909.06335, as used label by label in
Li et al. 2021, arXiv:2102.02079; shards, McMahan et al. 2017, arXiv:1602.05629.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from rayfed_lora.plugins.tables import PARTITIONS

IndexArray = npt.NDArray[np.int64]


def partition(name: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Register a partition: a function of (labels, clients, rng) that returns who holds what.

    `labels` are (n,) the classes of the training examples, numbers from 0 (all 0 for texts without
    labels), `clients` is `data.partition.clients`, `rng` a numpy generator of the run's seed. It
    returns (n,) whole numbers, the client of each example from 0 to clients - 1, or a list of
    `clients` index arrays that hold each example once. Every client needs an example. Keyword-only
    parameters are its options; one named like a key of `data.partition` gets that key's value.

    Args:
        name: value of `data.partition.kind`; default: the function's, with hyphens.

    Raises:
        PluginError: the name is taken, or an option is not typed.
    """
    return lambda function: PARTITIONS.add(function, name)


@partition()
def iid(labels: IndexArray, clients: int, rng: np.random.Generator) -> IndexArray:
    """Deal evenly and at random; the clients' numbers of examples differ by one at most."""
    return rng.permutation(np.repeat(np.arange(clients), _even(len(labels), clients)))


@partition()
def dirichlet(
    labels: IndexArray,
    clients: int,
    rng: np.random.Generator,
    *,
    alpha: float = 0.5,
    min_examples: int = 4,
) -> IndexArray:
    """Deal each label's examples in proportions ~ Dirichlet(alpha) over the clients."""
    return _top_up(_by_label(labels, clients, alpha, rng), clients, min_examples, rng)


@partition()
def shards(
    labels: IndexArray, clients: int, rng: np.random.Generator, *, shards_per_client: int = 2
) -> IndexArray:
    """Sort by label, cut into clients * shards_per_client pieces, and deal these at random."""
    return _by_shards(labels, clients, shards_per_client, rng)


@partition()
def quantity(
    labels: IndexArray,
    clients: int,
    rng: np.random.Generator,
    *,
    alpha: float = 0.5,
    min_examples: int = 4,
) -> IndexArray:
    """Draw the clients' sizes ~ Dirichlet(alpha); labels are dealt at random."""
    owner = _by_shares(len(labels), rng.dirichlet(np.full(clients, alpha)), rng)
    return _top_up(owner, clients, min_examples, rng)


@partition()
def column(labels: IndexArray, clients: int, rng: np.random.Generator) -> IndexArray:
    """Make a client of each value of `data.partition.column`, whose numbers stand for labels."""
    del clients, rng
    return labels


def _sizes(total: int, shares: npt.NDArray[np.float64], offset: float) -> IndexArray:
    """Round total * shares to whole numbers that sum to total, each less than one off.

    Systematic sampling: with `offset` uniform in [0, 1) every expected size is exact.
    """
    edges = np.floor(np.cumsum(shares) * total + offset).astype(np.int64)
    edges = np.minimum(edges, total)
    edges[-1] = total
    return np.diff(edges, prepend=0)


def _even(total: int, parts: int) -> IndexArray:
    return np.diff(np.arange(parts + 1) * total // parts)


def _by_shares(total: int, shares: npt.NDArray[np.float64], rng: np.random.Generator) -> IndexArray:
    owner = np.repeat(np.arange(len(shares)), _sizes(total, shares, rng.random()))
    return rng.permutation(owner)


def _by_label(
    labels: npt.NDArray[np.int64], clients: int, alpha: float, rng: np.random.Generator
) -> IndexArray:
    owner = np.empty(len(labels), dtype=np.int64)
    by_label = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[by_label])) + 1
    for rows in np.split(by_label, starts):
        owner[rows] = _by_shares(len(rows), rng.dirichlet(np.full(clients, alpha)), rng)
    return owner


def _by_shards(
    labels: npt.NDArray[np.int64], clients: int, shards_per_client: int, rng: np.random.Generator
) -> IndexArray:
    total, shards = len(labels), clients * shards_per_client
    shuffled = rng.permutation(total)
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    shard_owner = rng.permutation(np.repeat(np.arange(clients), shards_per_client))
    owner = np.empty(total, dtype=np.int64)
    owner[by_label] = np.repeat(shard_owner, _even(total, shards))
    return owner


def _top_up(
    owner: IndexArray, clients: int, min_examples: int, rng: np.random.Generator
) -> IndexArray:
    counts = np.bincount(owner, minlength=clients)
    missing = np.maximum(min_examples - counts, 0)
    if not missing.any():
        return owner
    gives = counts - _levelled(counts, int(missing.sum()), min_examples)
    shuffled = rng.permutation(len(owner))
    grouped = shuffled[np.argsort(owner[shuffled], kind="stable")]
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    moved = grouped[place < np.repeat(gives, counts)]
    topped = owner.copy()
    topped[rng.permutation(moved)] = np.repeat(np.arange(clients), missing)
    return topped


def _levelled(counts: IndexArray, taken: int, floor: int) -> IndexArray:
    """Return the counts after taking one example from the largest client `taken` times.

    Counts above a water level end at the level; the last clients of a tie keep one more. The level
    is found by bisection.
    """
    low, high = floor, int(counts.max())
    while low < high:  # the highest level with enough examples above it
        middle = (low + high + 1) // 2
        if np.maximum(counts - middle, 0).sum() >= taken:
            low = middle
        else:
            high = middle - 1
    levelled = np.minimum(counts, low + 1)
    tied = np.flatnonzero(levelled == low + 1)
    levelled[tied[: taken - int((counts - levelled).sum())]] = low
    return levelled
