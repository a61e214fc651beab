"""What an actor's memory is planned to hold. Estimates; measured: benchmarks/step_memory.py.

Source: this project.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rayfed_lora.recipe.memory import LOGIT_BYTES, LOGIT_COPIES, step_bytes
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.types import Device, ModelShape
from rayfed_lora.wire.update import BYTES_PER_VALUE

# Values of optimiser state for each trained one; of others, as of adamw.
_OPTIMIZER_STATES = {"sgd": 0, "adagrad": 1, "rmsprop": 1, "asgd": 1}
# Cards, and machines, whose memory the plan is compared with, bytes.
CARDS = {"24 GB": 24e9, "80 GB": 80e9}
# Share of a card's memory that the estimate leaves free: context, fragments, workspaces.
_SPARE = 0.9


@dataclass(frozen=True)
class ActorMemory:
    """Memory of an actor that trains adapter rounds, bytes.

    Attributes:
        device: kind of device.
        base: frozen weights; on a CPU the actors of a machine share them.
        trained: of one client: factors and head, their gradients and optimiser state.
        activations: of one client's step.
        logits: of a language model, of all clients together.
        clients: number of clients that are trained together.
    """

    device: Device
    base: float
    trained: float
    activations: float
    logits: float
    clients: int

    @property
    def total(self) -> float:
        """What the actor holds while it trains."""
        return self.base + self.logits + self.clients * (self.trained + self.activations)

    def fitting(self, memory: float) -> int:
        """Return how many clients can be trained together in a memory, bytes.

        >>> ActorMemory("cuda", 10e9, 1e9, 2e9, 0.6e9, 1).fitting(24e9)
        3
        """
        left = _SPARE * memory - self.base - self.logits
        return max(math.floor(left / (self.trained + self.activations)), 0)


def actor_memory(
    recipe: Recipe,
    shape: ModelShape,
    trained: int,
    clients: int,
    device: Device,
    *,
    short: bool,
    batch: int | None = None,
) -> ActorMemory:
    """Return the planned memory of an actor.

    Args:
        recipe: the run.
        shape: of the model.
        trained: number of values that a client trains.
        clients: number of clients trained together.
        device: kind of device.
        short: whether the source has its weights in 16 bits.
        batch: the largest batch size of a client; None: that of all.
    """
    optimizer = recipe.clients.optimizer
    states = _OPTIMIZER_STATES.get(optimizer.name, 2)
    states += optimizer.momentum > 0 and optimizer.name in ("sgd", "rmsprop")
    logits = LOGIT_COPIES * LOGIT_BYTES[device] if shape.logit_bytes > 0 else 0
    return ActorMemory(
        device,
        base_bytes(recipe, shape, device, short=short),
        trained * BYTES_PER_VALUE * (2 + states),
        step_bytes(recipe, shape, device, batch),
        logits,
        clients,
    )


def base_bytes(recipe: Recipe, shape: ModelShape, device: Device, *, short: bool) -> float:
    """Return the bytes of the frozen weights as `model.dtype` keeps them.

    Matrices have two bytes a value in bfloat16, all else has four. `short`: whether the source has
    them so, which `auto` follows on a GPU.
    """
    dtype = recipe.model.dtype
    halved = dtype == "bfloat16" or (dtype == "auto" and device == "cuda" and short)
    total = shape.total_params * BYTES_PER_VALUE
    if not halved:
        return total
    matrices = sum(
        math.prod(size)
        for name, size in shape.tensors.items()
        if len(size) == 2 and name not in shape.head
    )
    return total - matrices * BYTES_PER_VALUE / 2
