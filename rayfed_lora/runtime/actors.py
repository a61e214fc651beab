"""What runs inside Ray's worker processes. Plain classes, so that tests build them without Ray.

Source: this project.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import ray

from rayfed_lora.federation.executor import Population, Split
from rayfed_lora.recipe import Recipe
from rayfed_lora.runtime.factory import Factory, population
from rayfed_lora.training.trainer import Trainer
from rayfed_lora.training.workload import Workload
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientUpdate,
    EvaluationSums,
    FloatArray,
    LocalPlan,
    Trainable,
)

# Share of its GPU fraction that an actor may allocate; the rest is the driver's own.
_MEMORY_SHARE = 0.95


def device_of_this_actor(gpus: float) -> str:
    """Return the torch device that Ray gave this actor, and bound its share of the memory.

    An actor without GPUs sees all of them on a GPU node: it must take the CPU on purpose.

    Args:
        gpus: the actor's GPU share; logical GPUs without a card behind them count as none.
    """
    if gpus == 0:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    if gpus < 1:
        torch.cuda.set_per_process_memory_fraction(_MEMORY_SHARE * gpus, 0)
    return "cuda:0"


class ClientActor:
    """A trainer on a CPU or GPU share; serves many virtual clients, keeps nothing between calls."""

    def __init__(
        self,
        recipe: Recipe,
        factory: Factory,
        workload: list[ray.ObjectRef],
        gpus: float,
        name: str,
    ) -> None:
        """Keep what the trainer is made from; it is made on the first call, also after a restart.

        Args:
            recipe: the run.
            factory: makes the trainer.
            workload: one reference, in a list so that Ray does not wait for it.
            gpus: this actor's GPU share.
            name: readable name; the dashboard reads it once.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._recipe = recipe
        self._factory = factory
        self._workload = workload[0]
        self._gpus = gpus
        self._name = name
        self._trainer: Trainer | None = None

    def __repr__(self) -> str:
        return f"{self._name} of {self._recipe.name}"

    def _opened(self) -> Trainer:
        if self._trainer is None:
            device = device_of_this_actor(self._gpus)
            workload: Workload = ray.get(self._workload)
            self._trainer = self._factory.trainer(self._recipe, workload, device)
        return self._trainer

    def open(self) -> Population:
        """Build the trainer and say what it serves."""
        import transformers  # noqa: F401 - slow to import; done while the data are being prepared

        trainer = self._opened()
        return population(ray.get(self._workload), trainer)

    def initial_tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the dense tensors that the first round starts from."""
        return self._opened().initial_tensors(trainable)

    def train(
        self, block: Sequence[int], state: AdapterState, base: Base, plan: LocalPlan
    ) -> list[ClientUpdate]:
        """Train a block's clients; arrays from the object store are read-only."""
        return self._opened().train(block, state, base, plan)

    def evaluate(
        self, split: Split, rows: slice, state: AdapterState, base: Base, trainable: Trainable
    ) -> EvaluationSums:
        """Return the sums over some rows of a split."""
        return self._opened().evaluate(split, rows, state, base, trainable)

    def export(self, state: AdapterState, base: Base, trainable: Trainable) -> dict[str, bytes]:
        """Return the files of the trained model."""
        return self._opened().export(state, base, trainable)


def prepare_workload(recipe: Recipe, factory: Factory) -> tuple[Workload, None]:
    """Read and prepare the data, as a Ray task: its result is shared by all actors.

    Returns:
        The workload, and a second result that tells of success without fetching the first.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return factory.workload(recipe), None
