"""Partitions of the training examples over clients.

Every kind of partition draws one owner for each example.

Source: label skew by Dirichlet, Hsu et al. 2019, arXiv:1909.06335, as used label by label in
Li et al. 2021, arXiv:2102.02079; shards, McMahan et al. 2017, arXiv:1602.05629.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfed_lora import seeds
from rayfed_lora.data import naming
from rayfed_lora.data.client_table import ClientTable, IndexArray
from rayfed_lora.errors import DataError
from rayfed_lora.recipe.data import Partition

_MOST_CLIENTS = 1_000_000  # partitions of more clients than examples are tried up to this number
_MOST_SHARDS = 100  # shards an example; more are rejected before their arrays are made
_NAMED_CLIENTS = 5  # number of empty clients that an error names


def deal(
    labels: npt.NDArray[np.int64],
    partition: Partition,
    seed: int,
    column: Sequence[str] | None = None,
) -> ClientTable:
    """Deal every example to exactly one client.

    * iid: even and random; counts differ by one at most.
    * dirichlet: each label's examples in proportions ~ Dirichlet(alpha) over the clients.
    * shards: examples sorted by label, cut into clients * shards_per_client pieces, dealt randomly.
    * quantity: client sizes ~ Dirichlet(alpha), labels at random.
    * column: one client for each distinct value, in the order of `client_names`;
      `partition.clients` is ignored.

    With dirichlet and quantity, a client short of `min_examples` then gets random examples, each
    taken from the largest client at that moment.

    `labels` are those of the training rows, (n,); `column` has each row's client (kind column).

    Raises:
        DataError: no examples, a client without an example, or fewer examples than
            clients * min_examples (dirichlet, quantity).
        ValueError: kind column without a `column` of the labels' length.
    """
    if len(labels) == 0:
        raise DataError("data.partition: need training examples to deal, got none")
    _require_possible(len(labels), partition)
    rng = seeds.generator(seed, seeds.Purpose.PARTITION)
    clients = partition.clients
    match partition.kind:
        case "iid":
            owner = rng.permutation(np.repeat(np.arange(clients), _even(len(labels), clients)))
        case "shards":
            owner = _by_shards(labels, clients, partition.shards_per_client, rng)
        case "dirichlet":
            owner = _by_label(labels, clients, partition.alpha, rng)
            owner = _top_up(owner, clients, partition.min_examples, rng)
        case "quantity":
            shares = rng.dirichlet(np.full(clients, partition.alpha))
            owner = _by_shares(len(labels), shares, rng)
            owner = _top_up(owner, clients, partition.min_examples, rng)
        case "column":
            owner, clients = _by_column(len(labels), column)
    table = _group(owner, clients)
    _require_no_empty_client(table, partition)
    return table


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


def client_names(column: Sequence[str]) -> list[str]:
    """Return the distinct clients of a column, sorted by value if all are whole numbers."""
    return naming.in_order(pa.array(column, type=pa.string()).unique().to_pylist())


def _by_column(total: int, column: Sequence[str] | None) -> tuple[IndexArray, int]:
    if column is None or len(column) != total:
        got = "none" if column is None else f"{len(column)}"
        raise ValueError(f"kind 'column' needs the client of each of the {total} rows, got {got}")
    names = pa.array(column, type=pa.string())
    distinct = client_names(column)
    owner = pc.index_in(names, value_set=pa.array(distinct, type=pa.string()))
    return owner.to_numpy(zero_copy_only=False).astype(np.int64), len(distinct)


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


def _group(owner: IndexArray, clients: int) -> ClientTable:
    counts = np.bincount(owner, minlength=clients)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    return ClientTable(np.argsort(owner, kind="stable").astype(np.int64, copy=False), offsets)


def _require_possible(total: int, partition: Partition) -> None:
    """Reject numbers that no partition can meet, before arrays of their size are made."""
    if partition.kind == "column":
        return
    if partition.clients > max(total, _MOST_CLIENTS):
        raise DataError(
            f"data.partition: {partition.clients:,} clients need at least as many"
            f" training examples, got {total:,}; set `data.partition.clients` to at most {total}"
        )
    pieces = partition.clients * partition.shards_per_client
    if partition.kind == "shards" and pieces > _MOST_SHARDS * total:
        raise DataError(
            f"data.partition: {partition.clients:,} clients with {partition.shards_per_client:,}"
            f" pieces each (shards_per_client) need {pieces:,} training examples, got {total:,};"
            f" keep clients * shards_per_client at {total} or below"
        )
    needed = partition.clients * partition.min_examples
    if partition.kind in ("dirichlet", "quantity") and total < needed:
        raise DataError(
            f"data.partition: {partition.clients} clients with min_examples"
            f" {partition.min_examples} need {needed} training examples, got {total};"
            " lower `data.partition.clients` or `data.partition.min_examples`"
        )


def _require_no_empty_client(table: ClientTable, partition: Partition) -> None:
    empty = np.flatnonzero(table.counts == 0)
    if len(empty) == 0:
        return
    total = len(table.order)
    named = ", ".join(str(client) for client in empty[:_NAMED_CLIENTS])
    more = ", ..." if len(empty) > _NAMED_CLIENTS else ""
    if partition.kind == "shards":
        remedy = f"keep clients * shards_per_client at {total} or below"
    elif total >= table.clients:
        remedy = "set `data.partition.min_examples` to at least 1, or raise `data.partition.alpha`"
    else:
        remedy = f"set `data.partition.clients` to at most {total}"
    raise DataError(
        f"data.partition: kind {partition.kind!r} leaves {len(empty)} of {table.clients} clients"
        f" without an example (clients {named}{more}) of {total} training examples; {remedy}"
    )
