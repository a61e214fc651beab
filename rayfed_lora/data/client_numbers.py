"""Numbers that differ between clients: of their devices, and of their local training.

They follow from the seed and the client's id alone. Source: this project.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayfed_lora.data.client_table import ClientTable
from rayfed_lora.errors import DataError
from rayfed_lora.printable import client_label
from rayfed_lora.recipe.clients import Spread
from rayfed_lora.recipe.settings import Settings
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.types import DeviceFacts, LocalSettings

Numbers = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def numbers_of(spread: Spread, facts: DeviceFacts, seed: int, stream: int) -> Numbers:
    """Return each client's number, (clients,) > 0.

    Args:
        spread: a column, or the distribution to draw from.
        facts: of the clients; gives the columns.
        seed: of the run.
        stream: of the draws; another one for each setting.
    """
    clients = len(facts.sizes)
    if spread.column is not None:
        return facts.columns[spread.column]
    rng = generator(seed, Purpose.DEVICES, stream)
    if spread.choices is not None:
        shares = np.array(spread.shares or [1.0] * len(spread.choices))
        return rng.choice(np.array(spread.choices), clients, p=shares / shares.sum())
    if spread.low is not None and spread.high is not None:
        return rng.uniform(spread.low, spread.high, clients)
    middle = spread.median if spread.median is not None else np.inf
    return middle * np.exp(spread.sigma * rng.standard_normal(clients))


def counts_of(spread: Spread, facts: DeviceFacts, seed: int, stream: int) -> Counts:
    """Return each client's whole number, (clients,) >= 1; arguments as `numbers_of`.

    Lognormal numbers are rounded, at least 1; uniform ones are the whole numbers from low to high.
    """
    if spread.column is None and spread.low is not None and spread.high is not None:
        rng = generator(seed, Purpose.DEVICES, stream)
        return rng.integers(int(spread.low), int(spread.high), len(facts.sizes), endpoint=True)
    rounded = np.floor(numbers_of(spread, facts, seed, stream) + 0.5)
    return np.clip(rounded, 1, np.iinfo(np.int32).max).astype(np.int64)


def check_settings(
    key: str,
    column: str,
    values: Numbers,
    clients: ClientTable,
    names: Sequence[str] | None,
    *,
    whole: bool,
) -> None:
    """Raise unless all examples of each client have the same value in a column of settings.

    Args:
        key: of the recipe, for the error.
        column: its name in the data.
        values: (n,) in the order of `clients.order`, none of them missing.
        clients: their examples; each client has one.
        names: of the clients in the data, if any.
        whole: whether the values have to be whole numbers.

    Raises:
        DataError: a value differs or is no whole number; names the first such client.
    """
    first = values[clients.offsets[:-1]]
    of_row = np.repeat(np.arange(clients.clients), clients.counts)
    wrong = np.flatnonzero(values != first[of_row])
    expected, got = "one value in all examples of a client", ""
    if len(wrong) > 0:
        client = int(of_row[wrong[0]])
        got = f"{first[client]:g} and {values[wrong[0]]:g}"
    elif whole and (first % 1 != 0).any():
        client = int(np.argmax(first % 1 != 0))
        expected, got = "whole numbers", f"{first[client]:g}"
    else:
        return
    name = client_label(client, names)
    raise DataError(f"{key}: column {column!r}: expected {expected}, got {got} for {name}")


def _fitting(sizes: Counts, facts: DeviceFacts) -> Counts:
    """Return batch sizes of at most the clients' numbers of examples."""
    return np.minimum(sizes, np.maximum(facts.sizes, 1))


@dataclass(frozen=True)
class ClientSettings:
    """The settings of local training: a number for all clients, or (clients,) each one's own.

    Attributes:
        lr: of `clients.optimizer.lr`.
        steps: local steps a round; None where the length is given in epochs.
        batch_size: examples of a micro-batch; of its own, a client has as many at least.
        accumulate: micro-batches a step.
    """

    lr: Numbers | float
    steps: Counts | int | None
    batch_size: Counts | int
    accumulate: int = 1

    @classmethod
    def of(cls, recipe: Settings, facts: DeviceFacts) -> ClientSettings:
        """Draw the settings of a run's clients, or take them from columns of the data."""
        clients, seed = recipe.clients, recipe.seed
        lr, steps, size = clients.optimizer.lr, clients.steps, clients.batch_size
        return cls(
            numbers_of(lr, facts, seed, 3) if isinstance(lr, Spread) else lr,
            counts_of(steps, facts, seed, 4) if isinstance(steps, Spread) else steps,
            _fitting(counts_of(size, facts, seed, 5), facts) if isinstance(size, Spread) else size,
            clients.accumulate,
        )

    @property
    def own(self) -> dict[str, Numbers | Counts]:
        """The settings that differ between clients, by their column of clients.parquet."""
        found = {"lr": self.lr, "local_steps": self.steps, "batch_size": self.batch_size}
        return {name: values for name, values in found.items() if isinstance(values, np.ndarray)}

    @property
    def mean_lr(self) -> float:
        """The mean learning rate of all clients."""
        return float(np.mean(self.lr)) if isinstance(self.lr, np.ndarray) else self.lr

    @property
    def most_examples(self) -> int:
        """The largest batch size: micro-batches of all clients have at most as many examples."""
        return int(np.max(self.batch_size))

    @property
    def step_examples(self) -> Counts | int:
        """Most examples of an optimiser step, of all clients or (clients,) of each."""
        return self.batch_size * self.accumulate

    def examples_trained_on(self, clients: Counts, sizes: Counts, epochs: int) -> Counts:
        """Return how many examples clients train on in a round, repeats included.

        Args:
            clients: (n,) ids.
            sizes: (n,) numbers of training examples.
            epochs: passes, where no number of steps is given.
        """
        if self.steps is None:
            return sizes * epochs
        steps, size = (
            values[clients] if isinstance(values, np.ndarray) else values
            for values in (self.steps, self.step_examples)
        )
        found: Counts = steps * np.minimum(size, sizes)
        return found

    def by_client(
        self, clients: Iterable[int], rate: Callable[[float], float]
    ) -> dict[int, LocalSettings]:
        """Return what differs between some clients, if anything.

        `rate` returns a round's learning rate of a client's own one.
        """
        lr, steps, size = (self.own.get(name) for name in ("lr", "local_steps", "batch_size"))
        return {
            k: LocalSettings(
                None if lr is None else rate(float(lr[k])),
                None if steps is None else int(steps[k]),
                None if size is None else int(size[k]),
            )
            for k in (clients if self.own else ())
        }
