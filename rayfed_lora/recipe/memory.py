"""Memory of a training step beside the weights, estimated from the sizes of a model.

Measured: benchmarks/step_memory.py. Source: this project.
"""

from __future__ import annotations

from collections.abc import Mapping

from rayfed_lora.recipe.clients import Spread
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.types import Device, ModelShape

# Logits of a language model that are computed at once, float32, and the copies of them in a step.
LOGIT_BYTES: Mapping[Device, int] = {"cpu": 1 << 24, "cuda": 1 << 28}
LOGIT_COPIES = 4
# Texts of a test that are computed at once: tokens times vocabulary, float32. Where logits are made
# in chunks they are never there together, but the activations of so many tokens are.
TESTED_LOGIT_BYTES: Mapping[Device, int] = {"cpu": 1 << 30, "cuda": 1 << 32}
# Memory that training holds per linear layer, in sizes of its output (gradients, attention, norms).
HELD_PER_LINEAR_OUTPUT = 3
# Largest memory of a block. A GPU's is an estimate. `runtime.checkpoint_activations: auto` begins
# above it too.
BLOCK_BYTES: Mapping[Device, float] = {"cpu": 1e9, "cuda": 8e9}


def largest_batch(recipe: Recipe, batch: int | None = None) -> int:
    """Return `batch`, the largest batch size of a client; None: that of all.

    Raises:
        ValueError: clients have batch sizes of their own, and the largest is not given.
    """
    size_of_all = recipe.clients.batch_size
    if batch is not None:
        return batch
    if isinstance(size_of_all, Spread):
        raise ValueError("need the largest batch size: clients have their own")
    return size_of_all


def checkpoints(
    recipe: Recipe, shape: ModelShape, clients: int, device: Device, batch: int | None = None
) -> bool:
    """Return whether a block of `clients` recomputes its activations in the backward pass.

    `runtime.checkpoint_activations` or, with `auto`, in language models whose activations would
    take more than `BLOCK_BYTES`: the longest texts are assumed. `batch` as of `largest_batch`.
    """
    wanted = recipe.runtime.checkpoint_activations
    if wanted != "auto":
        return wanted
    able = shape.logit_bytes > 0 and shape.checkpointed_bytes > 0
    return able and clients * _kept(shape, largest_batch(recipe, batch)) > BLOCK_BYTES[device]


def step_bytes(
    recipe: Recipe, shape: ModelShape, device: Device, batch: int | None = None
) -> float:
    """Return the estimated memory of one client's activations in a step (a micro-batch).

    `batch` as of `largest_batch`.
    """
    batch = largest_batch(recipe, batch)
    if shape.checkpointed_bytes > 0 and checkpoints(recipe, shape, 1, device, batch):
        return float(shape.checkpointed_bytes * batch)
    return _kept(shape, batch)


def room_bytes(shape: ModelShape, device: Device) -> float:
    """Return what a block's activations may take: less the logits of a language model."""
    logits = LOGIT_COPIES * LOGIT_BYTES[device] if shape.logit_bytes > 0 else 0
    return BLOCK_BYTES[device] - logits


def _kept(shape: ModelShape, batch: int) -> float:
    """Return the estimate for one client where all activations are kept."""
    kept = shape.activation_bytes - shape.logit_bytes
    return float(HELD_PER_LINEAR_OUTPUT * kept * batch)
