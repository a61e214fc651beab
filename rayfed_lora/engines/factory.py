"""What a worker makes of a recipe: its workload and its trainer. Source: this project."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tasks.engine import Population, Trainer

if TYPE_CHECKING:
    from rayfed_lora.data.memory import Held
    from rayfed_lora.data.workload import Workload
    from rayfed_lora.training.weights import Weights


class Factory(Protocol):
    """Makes workloads and trainers; picklable, so that it can travel to actors."""

    def load(self, recipe: Recipe) -> None:
        """Import what is slow to import, while others prepare the data."""
        ...

    def workload(self, recipe: Recipe) -> Workload:
        """Read and prepare the data; once a run."""
        ...

    def weights(self, recipe: Recipe, workload: Workload) -> Weights:
        """Read the base model's weights; once a run."""
        ...

    def trainer(self, recipe: Recipe, workload: Workload, weights: Weights, device: str) -> Trainer:
        """Build a trainer on weights that it must not write to; once an actor."""
        ...


# An actor prepares the data in one thread and loads code in another one. Two threads that import
# transformers at once end with a half-made module of it.
_IMPORTING = Lock()


@contextmanager
def _no_collections() -> Iterator[None]:
    """Pause the process's garbage collector: a seventh of the time of these imports."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class TorchFactory:
    """The real thing: data from their source, models on torch.

    torch and transformers are imported by its methods only: a driver never needs them.
    """

    def load(self, recipe: Recipe) -> None:
        """Import torch, transformers and the model's own module."""
        with _IMPORTING:
            with _no_collections():
                import_module("rayfed_lora.training.trainer")
            from rayfed_lora.models import base_models

            base_models.load_code(recipe.model)

    def workload(self, recipe: Recipe) -> Workload:
        """Read and prepare the data."""
        self.load(recipe)
        from rayfed_lora.training.preparing import prepare

        return prepare(recipe)

    def weights(self, recipe: Recipe, workload: Workload) -> Weights:
        """Read the base model's weights."""
        from rayfed_lora.training.weights import built_weights

        return built_weights(recipe, workload)

    def trainer(self, recipe: Recipe, workload: Workload, weights: Weights, device: str) -> Trainer:
        """Build the model and its trainer."""
        from rayfed_lora.training.trainer import LocalTrainer

        return LocalTrainer(recipe, workload, device, weights)


@dataclass(frozen=True)
class WithTables:
    """A factory that first hands over rows that a caller has in memory; `fetch` returns them."""

    factory: Factory
    fetch: Callable[[], Mapping[str, Held]]

    def load(self, recipe: Recipe) -> None:
        """See `Factory`."""
        self.factory.load(recipe)

    def workload(self, recipe: Recipe) -> Workload:
        """See `Factory`."""
        from rayfed_lora.data.memory import restore

        restore(self.fetch())
        return self.factory.workload(recipe)

    def weights(self, recipe: Recipe, workload: Workload) -> Weights:
        """See `Factory`."""
        return self.factory.weights(recipe, workload)

    def trainer(self, recipe: Recipe, workload: Workload, weights: Weights, device: str) -> Trainer:
        """See `Factory`."""
        return self.factory.trainer(recipe, workload, weights, device)


def on_device(recipe: Recipe, device: str) -> Recipe:
    """Return the recipe with the device that was found for it: the base's type depends on it."""
    kind = "cpu" if device == "cpu" else "cuda"
    runtime = recipe.runtime.model_copy(update={"device": kind})
    return recipe.model_copy(update={"runtime": runtime})


def prepared(recipe: Recipe, factory: Factory) -> tuple[None, Workload, Weights]:
    """Make what all actors of a run share.

    Returns:
        A first result that tells of success without fetching the others; workload and weights.
    """
    workload = factory.workload(recipe)
    return None, workload, factory.weights(recipe, workload)


def population(workload: Workload, trainer: Trainer, device: str) -> Population:
    """Return what the round loop needs to know of a workload."""
    classes, names = len(workload.label_names), workload.client_names
    shape = trainer.shape()
    return Population(
        shape=shape,
        clients=workload.clients.clients,
        examples={"validation": len(workload.validation), "test": len(workload.test)},
        label_names=workload.label_names,
        device="cpu" if device == "cpu" else "cuda",
        devices=workload.devices,
        label_counts=workload.clients.label_counts(workload.train.labels, classes),
        notes=(*workload.notes, *shape.notes),
        client_names=None if names is None else tuple(names.to_pylist()),
        fingerprint=workload.fingerprint,
        start=workload.start,
        prompts=None if workload.prompts is None else workload.prompts.facts,
    )


def in_process(recipe: Recipe, factory: Factory, device: str) -> tuple[list[Trainer], Population]:
    """Make workload and trainers here and now: one, or on a CPU as many as the recipe asks for.

    That is as many as its client actors would have, but one at most for a core.
    """
    recipe = on_device(recipe, device)
    workload = factory.workload(recipe)
    weights = factory.weights(recipe, workload)
    asked = recipe.runtime.client_actors
    count = 1
    if asked != "auto" and device == "cpu":
        count = min(asked * recipe.runtime.trainers_per_actor, os.cpu_count() or 1)
    trainers = [factory.trainer(recipe, workload, weights, device) for _ in range(count)]
    return trainers, population(workload, trainers[0], device)
