"""What it takes to train several clients in the same batches. Source: this project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayfed_lora.data.client_table import IndexArray, batch_indices
from rayfed_lora.recipe.clients import Clients
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.types import FloatArray, LocalPlan


@dataclass(frozen=True)
class ClientTask:
    """A client's work in one round.

    Attributes:
        client: client id.
        examples: number of examples it holds.
        batches: rows of the training split, an array a step.
    """

    client: int
    examples: int
    batches: list[IndexArray]

    @classmethod
    def of(
        cls,
        client: int,
        examples: npt.NDArray[np.int64],
        settings: Clients,
        seed: int,
        plan: LocalPlan,
    ) -> ClientTask:
        """Draw a client's batches of a round.

        Args:
            client: client id.
            examples: (n,) the rows it holds.
            settings: the recipe's section.
            seed: the run's seed.
            plan: the round.
        """
        rng = generator(seed, Purpose.BATCHES, plan.round, client)
        batches = batch_indices(
            examples,
            settings.batch_size,
            rng,
            steps=settings.steps,
            epochs=settings.local_epochs,
        )
        return cls(client, len(examples), batches)


@dataclass(frozen=True)
class GroupBatch:
    """The batches of several clients, filled up to the largest of them.

    Attributes:
        indices: (clients * rows,) rows of the training split, one client after the other; a
            client's first row fills up.
        weights: (clients, rows) one by the size of the client's batch, 0 for what fills up: the
            weighted sum of a client's losses is the mean over its batch.
        examples: size of each client's own batch.
    """

    indices: IndexArray
    weights: FloatArray
    examples: tuple[int, ...]

    @classmethod
    def of(cls, batches: Sequence[IndexArray]) -> GroupBatch:
        """Join the batches of one step, one a client.

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


@dataclass(frozen=True)
class GroupTask:
    """What the clients of a group do in one round.

    Attributes:
        tasks: who has most steps comes first: who has done its steps leaves from the end.
        batches: of those who take part in a step, a step each.
    """

    tasks: Sequence[ClientTask]
    batches: Sequence[GroupBatch]

    @classmethod
    def of(cls, tasks: Sequence[ClientTask]) -> GroupTask:
        """Join what each client does, in whatever order."""
        ordered = sorted(tasks, key=lambda task: (-len(task.batches), task.client))
        batches = [
            GroupBatch.of([task.batches[step] for task in ordered if step < len(task.batches)])
            for step in range(len(ordered[0].batches))
        ]
        return cls(ordered, batches)
