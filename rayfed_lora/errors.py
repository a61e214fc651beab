"""The errors that a user may see, each with the exit status of the command line.

    RayfedError                  1
    |-- BadInputError            2   rejected before anything started
    |   |-- RecipeError          2   the recipe is faulty; lists every fault
    |   |-- DataError            2   a data set cannot be read or partitioned
    |   |-- ModelError           2   a model, target module or rank does not fit
    |   |-- PluginError          2   a plug-in cannot be imported, or its methods do not fit
    |   |-- ResourceError        2   the cluster lacks what the recipe asks for
    |   `-- RunFolderError       2   the run folder cannot be written or holds another run
    |-- ClientError              1   a client's training raised
    |-- RunError                 1   the run cannot continue
    |   `-- BlockMemoryError     1   a block does not fit into memory; the executor halves it
    `-- InterruptedRunError    130   stopped by the user; the last checkpoint is kept

Source: this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rayfed_lora.locations import without_secrets


class RayfedError(Exception):
    """A failure with a message for the user; credentials of URIs in it are masked."""

    exit_status = 1

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(without_secrets(a) if isinstance(a, str) else a for a in arguments))


class BadInputError(RayfedError):
    """The input cannot be run; nothing was started."""

    exit_status = 2


@dataclass(frozen=True)
class Fault:
    """One fault of a recipe.

    Attributes:
        path: dotted key, e.g. `clients.per_round`.
        expected: the accepted values.
        came: the given value (its repr), or None where the key itself is the fault.
        nearest: the nearest known key or value, or None.
    """

    path: str
    expected: str
    came: str | None = None
    nearest: str | None = None

    def __str__(self) -> str:
        came = "" if self.came is None else f", got {self.came}"
        return f"{self.path}: {self.expected}{came}{did_you_mean(self.nearest)}"


def did_you_mean(nearest: str | None) -> str:
    """Return the end of a message that names the nearest known word; empty where there is none."""
    return "" if nearest is None else f" (did you mean {nearest!r}?)"


class RecipeError(BadInputError):
    """A recipe with faults; `faults` lists all of them."""

    def __init__(self, source: str, faults: Sequence[Fault]) -> None:
        self.source = source
        self.faults = tuple(faults)
        count = f"{len(self.faults)} fault{'s' if len(self.faults) != 1 else ''}"
        lines = "\n".join(f"  {fault}" for fault in self.faults)
        super().__init__(f"{source}: {count} in the recipe; nothing was started\n{lines}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments: errors are sent between processes."""
        return type(self), (self.source, self.faults)


class DataError(BadInputError):
    """A data set cannot be found, read or partitioned."""


class ModelError(BadInputError):
    """A model cannot be built, or its layers do not fit the recipe."""


class PluginError(BadInputError):
    """A plug-in is not allowed, cannot be imported, or its methods do not fit."""


class ResourceError(BadInputError):
    """The cluster cannot hold the actors that the recipe asks for."""


class RunFolderError(BadInputError):
    """The run folder cannot be used."""


class RunError(RayfedError):
    """The run cannot continue; the last checkpoint is kept."""


class ClientError(RunError):
    """A client's local training raised an exception."""

    def __init__(self, client: int, round_index: int, trace: str, label: str | None = None) -> None:
        """Keep client, round (from 0), the client's own traceback, and the client's label."""
        self.client = client
        self.round_index = round_index
        self.trace = trace
        self.label = f"client {client}" if label is None else label
        super().__init__(f"{self.label} failed in round {round_index + 1}:\n{trace.rstrip()}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments: errors are sent between processes."""
        return type(self), (self.client, self.round_index, self.trace, self.label)

    @property
    def reason(self) -> str:
        """The last line of the traceback: the raised error."""
        return self.trace.rstrip().rpartition("\n")[2]


class BlockMemoryError(RunError):
    """A block of clients does not fit into memory; executors then train smaller blocks."""


class InterruptedRunError(RayfedError):
    """The user stopped the run."""

    exit_status = 130
