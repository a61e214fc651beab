"""What it takes to train several clients in the same batches. Source: this project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rayfed_lora.data.batches import IndexArray, batch_indices
from rayfed_lora.recipe_clients import Clients
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.types import AdapterState, FloatArray, LocalPlan


@dataclass(frozen=True)
class ClientTask:
    """A client's work in one round.

    Attributes:
        client: client id.
        start: the state that it starts from.
        examples: number of examples it holds.
        batches: rows of the training split, an array a step.
    """

    client: int
    start: AdapterState
    examples: int
    batches: list[IndexArray]

    @classmethod
    def of(
        cls,
        client: int,
        start: AdapterState,
        examples: npt.NDArray[np.int64],
        settings: Clients,
        seed: int,
        plan: LocalPlan,
    ) -> ClientTask:
        """Draw a client's batches of a round.

        Args:
            client: client id.
            start: the state that it starts from.
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
        return cls(client, start, len(examples), batches)


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


def clip_by_client(parameters: Sequence[torch.Tensor], limit: float, clients: int) -> None:
    """Cut each client's gradient, over all its parameters, to a norm of `limit` at most.

    The formula is that of `torch.nn.utils.clip_grad_norm_`, client by client.

    Args:
        parameters: the first dimension of each is the client; with one client it need not be.
        limit: largest norm, > 0.
        clients: number of clients.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    each = [torch.linalg.vector_norm(g.reshape(clients, -1), dim=1) for g in gradients]
    norms = torch.linalg.vector_norm(torch.stack(each), dim=0)
    shares = (limit / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        by_client = shares.view(clients, *[1] * (gradient.dim() - 1))
        gradient.mul_(by_client if gradient.dim() > 0 else by_client[0])


def kept(optimizer: torch.optim.Optimizer | None, clients: int) -> None:
    """Cut an optimiser's state to the first clients of the group, as its parameters have been."""
    for state in () if optimizer is None else optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                state[name] = value[:clients]
