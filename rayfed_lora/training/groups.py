"""Batches that several clients share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayfed_lora.data.client_table import IndexArray, batch_indices
from rayfed_lora.recipe.clients import Clients, Spread
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.types import FloatArray, LocalPlan, LocalSettings


@dataclass(frozen=True)
class ClientTask:
    """A client's work in one round.

    Attributes:
        examples: number of examples it holds.
        batches: rows of the training split, an array per step.
    """

    client: int
    examples: int
    batches: list[IndexArray]

    @classmethod
    def of(
        cls, client: int, examples: IndexArray, settings: Clients, seed: int, plan: LocalPlan
    ) -> ClientTask:
        """Draw a client's batches of a round from (n,) the rows it holds."""
        rng = generator(seed, Purpose.BATCHES, plan.round, client)
        steps, size, epochs = settings.steps, settings.batch_size, settings.local_epochs
        own = plan.own.get(client, LocalSettings())
        steps = steps if own.steps is None else own.steps
        size = size if own.batch_size is None else own.batch_size
        if isinstance(steps, Spread) or isinstance(size, Spread):
            raise ValueError("need the client's own number of steps and batch size, got none")
        size *= settings.accumulate
        batches = batch_indices(examples, size, rng, steps=steps, epochs=epochs)
        return cls(client, len(examples), batches)


@dataclass(frozen=True)
class GroupBatch:
    """The batches of several clients, padded to the largest of them.

    Attributes:
        indices: (clients * rows,) rows of the training split, one client after the other; a
            client's first row is the padding.
        weights: (clients, rows) 1 / size of the client's batch, 0 for padding: the weighted sum of
            a client's losses is the mean over its batch.
        examples: size of each client's own batch.
    """

    indices: IndexArray
    weights: FloatArray
    examples: tuple[int, ...]

    @classmethod
    def of(cls, batches: Sequence[IndexArray]) -> GroupBatch:
        """Join the batches of one step, one per client.

        >>> joined = GroupBatch.of([np.array([4, 7, 9]), np.array([2])])
        >>> joined.indices.tolist(), joined.weights[1].tolist()
        ([4, 7, 9, 2, 2, 2], [1.0, 0.0, 0.0])
        """
        examples = tuple(map(len, batches))
        sizes = np.array(examples)[:, None]
        place = np.arange(max(examples))
        own = place < sizes
        starts = np.cumsum(sizes) - sizes.ravel()
        indices = np.concatenate(batches)[(starts[:, None] + place * own).ravel()]
        weights = (own / sizes).astype(np.float32)
        return cls(indices, weights, examples)

    def parts(self, size: int) -> list[GroupBatch]:
        """Return micro-batches of at most `size` examples of each client, with weights as here.

        A client that has fewer examples than others only has padding in the last ones. `indices`
        are places in this batch.

        >>> joined = GroupBatch.of([np.array([4, 7, 9]), np.array([2])])
        >>> [(part.indices.tolist(), part.examples) for part in joined.parts(2)]
        [([0, 1, 3, 4], (2, 1)), ([2, 5], (1, 0))]
        """
        clients, rows = self.weights.shape
        places = np.arange(clients * rows).reshape(clients, rows)
        found = []
        for low in range(0, rows, size):
            part = slice(low, low + size)
            own = tuple(min(max(count - low, 0), size) for count in self.examples)
            found.append(GroupBatch(places[:, part].ravel(), self.weights[:, part], own))
        return found


@dataclass(frozen=True)
class GroupTask:
    """The work of a group of clients in one round.

    Attributes:
        tasks: most steps first: clients that have finished their steps leave from the end.
        batches: one per step, of the clients that take part in it.
    """

    tasks: Sequence[ClientTask]
    batches: Sequence[GroupBatch]

    @classmethod
    def of(cls, tasks: Sequence[ClientTask]) -> GroupTask:
        """Join the work of clients, given in any order."""
        ordered = sorted(tasks, key=lambda task: (-len(task.batches), task.client))
        batches = [
            GroupBatch.of([task.batches[step] for task in ordered if step < len(task.batches)])
            for step in range(len(ordered[0].batches))
        ]
        return cls(ordered, batches)
