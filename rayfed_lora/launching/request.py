"""A run that owns its folder and is ready to start. Source: this project."""

from __future__ import annotations

from dataclasses import dataclass, field

from rayfed_lora.engines.factory import Factory, TorchFactory
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.ownership import Ticket
from rayfed_lora.storage import RunFolder


@dataclass(frozen=True)
class RunRequest:
    """What a process needs to run a recipe; it travels to the driver actor.

    Attributes:
        recipe: the run, with absolute paths.
        location: claimed run folder, a local path or a URI.
        resume: continue from the newest checkpoint.
        factory: builds workload and trainers in the workers.
        ticket: the right to take over the folder from the process that claimed it; a restarted
            actor uses it again.
    """

    recipe: Recipe
    location: str
    resume: bool = False
    factory: Factory = field(default_factory=TorchFactory)
    ticket: Ticket | None = None

    @property
    def absolute_location(self) -> str:
        """The run folder as another process of this machine finds it."""
        local = RunFolder(self.location).local
        return self.location if local is None else str(local)
