"""Which client holds which training examples.

Every kind draws one owner for each example; the table keeps them as one array cut by offsets, so
that a hundred thousand clients cost two arrays and no object each.

Source: label skew by Dirichlet, Hsu et al. 2019, arXiv:1909.06335, as used label by label in
Li et al. 2021, arXiv:2102.02079; shards, McMahan et al. 2017, arXiv:1602.05629.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfed_lora import seeds
from rayfed_lora.data import naming
from rayfed_lora.errors import DataError
from rayfed_lora.recipe.data import Partition

IndexArray = npt.NDArray[np.int64]

_MOST_DEALT = 1_000_000  # clients that are dealt to, to name the empty ones
_MOST_PIECES = 100  # shards for each example: all but one of them are empty
NAMED_CLIENTS = 5  # how many empty clients an error names


@dataclass(frozen=True)
class ClientTable:
    """The examples of every client, grouped by client.

    Attributes:
        order: (n,) row indices; the rows of one client stand together, ascending.
        offsets: (clients + 1,); client k holds order[offsets[k] : offsets[k + 1]].
    """

    order: IndexArray
    offsets: IndexArray

    @property
    def clients(self) -> int:
        """Number of clients."""
        return len(self.offsets) - 1

    @property
    def counts(self) -> IndexArray:
        """(clients,) number of examples of each client."""
        return np.diff(self.offsets)

    def label_counts(
        self, labels: IndexArray, classes: int, most: int = 1000
    ) -> tuple[IndexArray, IndexArray]:
        """Return how many examples of each label some clients hold.

        Args:
            labels: (rows,) class of each row.
            classes: number of classes.
            most: number of clients, evenly spaced, that stand for all where there are more.

        Returns:
            (k,) clients and (k, classes) counts.
        """
        step = -(-self.clients // most)
        clients = np.arange(0, self.clients, step)
        counts = [np.bincount(labels[self.examples(int(k))], minlength=classes) for k in clients]
        return clients, np.stack(counts)

    def examples(self, client: int) -> IndexArray:
        """Return the row indices of one client, a view of `order`.

        Raises:
            IndexError: there is no such client.
        """
        if not 0 <= client < self.clients:
            raise IndexError(f"need a client from 0 to {self.clients - 1}, got {client}")
        return self.order[self.offsets[client] : self.offsets[client + 1]]


def hold_out(
    table: ClientTable, fraction: float, seed: int
) -> tuple[ClientTable, ClientTable | None]:
    """Split each client's examples into those it trains on and those it is tested on.

    A client of n examples keeps floor(n * fraction + 0.5) for testing, and at least one of each
    where it has two; one with a single example trains on it.

    Args:
        table: all examples.
        fraction: share for testing; 0: no client has any.
        seed: the run's seed.

    Returns:
        For training, and for testing (None where `fraction` is 0).
    """
    if fraction == 0.0:
        return table, None
    kept, held = [], []
    for client in range(table.clients):
        rows = table.examples(client)
        count = max(min(max(int(len(rows) * fraction + 0.5), 1), len(rows) - 1), 0)
        rng = seeds.generator(seed, seeds.Purpose.CLIENT_SPLIT, client)
        chosen = np.zeros(len(rows), bool)
        chosen[rng.choice(len(rows), count, replace=False)] = True
        kept.append(rows[~chosen])
        held.append(rows[chosen])
    return _table(kept), _table(held)


def _table(parts: Sequence[IndexArray]) -> ClientTable:
    offsets = np.cumsum([0, *(len(part) for part in parts)])
    return ClientTable(np.concatenate(parts), offsets.astype(np.int64))


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
    * column: one client a distinct value, in the order of `client_names`; `partition.clients` is
      not looked at.

    With dirichlet and quantity a client short of `min_examples` then gets random examples, each
    taken from the client that is the largest at that moment.

    Args:
        labels: (n,) labels of the training rows.
        partition: the recipe's section.
        seed: the run's seed.
        column: (n,) each row's client (kind column only).

    Raises:
        DataError: there is nothing to deal, a client would have no example, or there are fewer
            examples than clients * min_examples (dirichlet, quantity).
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
            _require_examples(len(labels), partition)
            owner = _by_label(labels, clients, partition.alpha, rng)
            owner = _top_up(owner, clients, partition.min_examples, rng)
        case "quantity":
            _require_examples(len(labels), partition)
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

    Source: systematic sampling; `offset` in [0, 1) shifts where the roundings fall, so that an
    expected size is exact when it is drawn uniformly.
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
    """Return the clients of kind column in their order: whole numbers by value, else by text.

    Args:
        column: (n,) each row's client.
    """
    return naming.in_order(pa.array(column, type=pa.string()).unique().to_pylist())


def _by_column(total: int, column: Sequence[str] | None) -> tuple[IndexArray, int]:
    if column is None or len(column) != total:
        came = "none" if column is None else f"{len(column)}"
        raise ValueError(f"kind 'column' needs the client of each of the {total} rows, got {came}")
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
    """Return the counts after `taken` times one example was taken from the largest client.

    All above a water level end on it, but for the last ones of a tie, which keep one more. The
    level is found by bisection instead of example by example.
    """
    low, high = floor, int(counts.max())
    while low < high:  # the highest level at which enough stands above
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
    """Reject numbers that no deal can meet, before arrays of their size are made."""
    if partition.kind == "column":
        return
    if partition.clients > max(total, _MOST_DEALT):
        raise DataError(
            f"data.partition: {partition.clients:,} clients need at least as many"
            f" training examples, got {total:,}; set `data.partition.clients` to at most {total}"
        )
    pieces = partition.clients * partition.shards_per_client
    if partition.kind == "shards" and pieces > _MOST_PIECES * total:
        raise DataError(
            f"data.partition: {partition.clients:,} clients with {partition.shards_per_client:,}"
            f" pieces each (shards_per_client) need {pieces:,} training examples, got {total:,};"
            f" keep clients * shards_per_client at {total} or below"
        )


def _require_examples(total: int, partition: Partition) -> None:
    needed = partition.clients * partition.min_examples
    if total < needed:
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
    named = ", ".join(str(client) for client in empty[:NAMED_CLIENTS])
    more = ", ..." if len(empty) > NAMED_CLIENTS else ""
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
