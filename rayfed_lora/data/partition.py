"""The training examples of each client, by the partition of the recipe (`partitions`).

Every kind of partition draws one owner for each example. Source: this project.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfed_lora import seeds
from rayfed_lora.data import naming
from rayfed_lora.data.client_table import ClientTable, IndexArray
from rayfed_lora.errors import DataError
from rayfed_lora.plugins.tables import PARTITIONS
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
        DataError: no examples, a client without an example, fewer examples than
            clients * min_examples (dirichlet, quantity), or an own partition that raised or did
            not return the client of each example.
        ValueError: kind column without a `column` of the labels' length.
    """
    if len(labels) == 0:
        raise DataError("data.partition: need training examples to deal, got none")
    _require_possible(len(labels), partition)
    rng = seeds.generator(seed, seeds.Purpose.PARTITION)
    clients = partition.clients
    if partition.kind == "column":
        labels, clients = _by_column(len(labels), column)
    owner = _dealt(labels, clients, partition, rng)
    table = _group(owner, clients)
    _require_no_empty_client(table, partition)
    return table


def _dealt(
    labels: IndexArray, clients: int, partition: Partition, rng: np.random.Generator
) -> IndexArray:
    """Return the client of each example, by the recipe's partition; what it returns is checked."""
    function = PARTITIONS.with_options(partition.kind, partition.options)
    try:
        return _owners(function(labels, clients, rng), len(labels), clients)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"data.partition: partition {partition.kind!r} failed:\n{traceback.format_exc()}"
        ) from error


def _owners(dealt: Any, total: int, clients: int) -> IndexArray:
    """Return the client of each example, given as such or as the examples of each client."""
    if isinstance(dealt, np.ndarray) and dealt.ndim == 1 and dealt.dtype != object:
        if dealt.shape != (total,) or dealt.dtype.kind not in "iu":
            got = f"{dealt.dtype} of shape {dealt.shape}"
            raise ValueError(f"expected the whole number of a client for {total} examples: {got}")
        if dealt.min() < 0 or dealt.max() >= clients:
            got = f"{dealt.min()} to {dealt.max()}"
            raise ValueError(f"expected clients 0 to {clients - 1}, got {got}")
        return dealt.astype(np.int64, copy=False)
    if len(dealt) != clients:
        raise ValueError(f"expected index arrays of {clients} clients, got {len(dealt)}")
    parts = [np.asarray(part, dtype=None if len(part) else np.int64) for part in dealt]
    rows = np.concatenate(parts)
    if rows.dtype.kind not in "iu" or not np.array_equal(np.sort(rows), np.arange(total)):
        raise ValueError(
            f"expected each example from 0 to {total - 1} at exactly one client, got {len(rows)}"
            f" places of {len(np.unique(rows))} examples"
        )
    owner = np.empty(total, dtype=np.int64)
    owner[rows] = np.repeat(np.arange(clients), [len(part) for part in parts])
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
