"""What a worker makes of a recipe: its workload and its trainer. Source: this project."""

from __future__ import annotations

from typing import Protocol

from rayfed_lora.federation.executor import Population
from rayfed_lora.recipe import Recipe
from rayfed_lora.training.trainer import LocalTrainer, Trainer
from rayfed_lora.training.workload import Workload, prepare


class Factory(Protocol):
    """Makes workloads and trainers; picklable, so that it can travel to actors."""

    def workload(self, recipe: Recipe) -> Workload:
        """Read and prepare the data; once a run."""
        ...

    def trainer(self, recipe: Recipe, workload: Workload, device: str) -> Trainer:
        """Build a trainer; once an actor."""
        ...


class TorchFactory:
    """The real thing: data from their source, models on torch."""

    def workload(self, recipe: Recipe) -> Workload:
        """Read and prepare the data."""
        return prepare(recipe)

    def trainer(self, recipe: Recipe, workload: Workload, device: str) -> Trainer:
        """Build the model and its trainer."""
        return LocalTrainer(recipe, workload, device)


def population(workload: Workload, trainer: Trainer) -> Population:
    """Return what the round loop needs to know of a workload."""
    return Population(
        shape=trainer.shape(),
        clients=workload.clients.clients,
        examples={"validation": len(workload.validation), "test": len(workload.test)},
        label_names=workload.label_names,
    )


def in_process(recipe: Recipe, factory: Factory, device: str) -> tuple[Trainer, Population]:
    """Make workload and trainer here and now."""
    workload = factory.workload(recipe)
    trainer = factory.trainer(recipe, workload, device)
    return trainer, population(workload, trainer)
