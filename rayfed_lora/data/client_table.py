"""Which client holds which examples, and the batches of one round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayfed_lora import seeds

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClientTable:
    """The examples of every client: one array cut by offsets, with no object for each client.

    Attributes:
        order: (n,) row indices grouped by client, ascending within a client.
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
        """Return (k,) clients, and their (k, classes) numbers of examples of each class.

        `labels` has the class of each row, (rows,); more than `most` clients are sampled evenly.
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
    """Return each client's training examples and test examples (None where `fraction` is 0).

    A client with n examples is tested on floor(n * fraction + 0.5) of them, where n >= 2 on at
    least one and at most n - 1; a client with a single example only trains.
    """
    if fraction == 0.0:
        return table, None
    training, tests = [], []
    for client in range(table.clients):
        rows = table.examples(client)
        count = max(min(max(int(len(rows) * fraction + 0.5), 1), len(rows) - 1), 0)
        rng = seeds.generator(seed, seeds.Purpose.CLIENT_SPLIT, client)
        chosen = np.zeros(len(rows), bool)
        chosen[rng.choice(len(rows), count, replace=False)] = True
        training.append(rows[~chosen])
        tests.append(rows[chosen])
    return _table(training), _table(tests)


def _table(parts: Sequence[IndexArray]) -> ClientTable:
    offsets = np.cumsum([0, *(len(part) for part in parts)])
    return ClientTable(np.concatenate(parts), offsets.astype(np.int64))


def batch_indices(
    examples: IndexArray,
    batch_size: int,
    rng: np.random.Generator,
    *,
    steps: int | None = None,
    epochs: int | None = None,
) -> list[IndexArray]:
    """Cut fresh permutations of a client's examples into batches, in training order.

    With b = min(batch_size, len(examples)): `steps` gives that many batches of exactly b, cut from
    one stream of permutations (a batch may span two of them); `epochs` permutes the examples anew
    for each pass and cuts every pass by itself, its last batch smaller where b does not divide it.

    Args:
        examples: (n,) row indices, n > 0.
        batch_size: examples a batch, > 0.
        rng: the stream of this client and round.
        steps: number of batches, > 0.
        epochs: number of passes, > 0; exactly one of `steps` and `epochs` is given.

    Raises:
        ValueError: an argument is out of its range.

    >>> batches = batch_indices(np.arange(5), 2, np.random.default_rng(0), epochs=1)
    >>> [len(batch) for batch in batches]
    [2, 2, 1]
    """
    if len(examples) == 0:
        raise ValueError("need at least one example, got an empty client")
    if batch_size <= 0:
        raise ValueError(f"need batch_size > 0, got {batch_size}")
    if (steps is None) == (epochs is None):
        raise ValueError(f"need one of steps and epochs, got steps={steps}, epochs={epochs}")
    size = min(batch_size, len(examples))
    if steps is not None:
        if steps <= 0:
            raise ValueError(f"need steps > 0, got {steps}")
        passes = math.ceil(steps * size / len(examples))
        stream = np.concatenate([rng.permutation(examples) for _ in range(passes)])
        return _cut(stream[: steps * size], size)
    if epochs is None or epochs <= 0:
        raise ValueError(f"need epochs > 0, got {epochs}")
    return [batch for _ in range(epochs) for batch in _cut(rng.permutation(examples), size)]


def _cut(stream: IndexArray, size: int) -> list[IndexArray]:
    return [stream[start : start + size] for start in range(0, len(stream), size)]
