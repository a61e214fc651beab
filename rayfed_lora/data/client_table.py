"""Which client holds which examples. Source: this project."""

from __future__ import annotations

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
        """Return the label distribution of a sample of clients.

        Args:
            labels: (rows,) class of each row.
            classes: number of classes.
            most: maximum number of clients; more are sampled evenly.

        Returns:
            (k,) clients and (k, classes) number of examples of each class.
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
    """Split each client's examples into training and test examples.

    A client with n examples is tested on floor(n * fraction + 0.5) of them, where n >= 2 on at
    least one and at most n - 1; a client with a single example only trains.

    Args:
        table: all examples.
        fraction: share for testing; 0: no client is tested.
        seed: the run's seed.

    Returns:
        The training examples, and the test examples (None where `fraction` is 0).
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
