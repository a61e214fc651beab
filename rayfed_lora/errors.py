"""The tree of errors a user can meet, each with the exit status of the command line.

    RayfedError                  1
    |-- BadInputError            2   refused before anything started
    |   |-- RecipeError          2   the recipe is faulty; lists every fault
    |   |-- DataError            2   a data set cannot be read or partitioned
    |   |-- ModelError           2   a model, target module or rank does not fit
    |   |-- ResourceError        2   the cluster lacks what the recipe asks for
    |   `-- RunFolderError       2   the run folder cannot be written or holds another run
    |-- ClientError              1   a client's training raised
    |-- RunError                 1   the run cannot go on
    |   `-- BlockMemoryError     1   clients do not fit into memory together; halved by the executor
    `-- InterruptedRunError    130   stopped by the user; the last checkpoint is kept

Source: this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rayfed_lora.locations import without_secrets


class RayfedError(Exception):
    """Any failure that has a message for the user; credentials of URIs in it are blotted out."""

    exit_status = 1

    def __init__(self, *arguments: object) -> None:
        """Keep the message."""
        super().__init__(*(without_secrets(a) if isinstance(a, str) else a for a in arguments))


class BadInputError(RayfedError):
    """What the user gave cannot be run; nothing was started."""

    exit_status = 2


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a recipe.

    Attributes:
        path: dotted key, e.g. `clients.per_round`.
        expected: what would be accepted.
        came: the value as given (its repr), or None where the key itself is the fault.
        nearest: the nearest known key or value, or None.
    """

    path: str
    expected: str
    came: str | None = None
    nearest: str | None = None

    def __str__(self) -> str:
        came = "" if self.came is None else f", got {self.came}"
        nearest = "" if self.nearest is None else f" (did you mean {self.nearest!r}?)"
        return f"{self.path}: {self.expected}{came}{nearest}"


class RecipeError(BadInputError):
    """A recipe with faults; `faults` lists all of them."""

    def __init__(self, source: str, faults: Sequence[Fault]) -> None:
        """Keep the faults and word one message that lists every one of them."""
        self.source = source
        self.faults = tuple(faults)
        count = f"{len(self.faults)} fault{'s' if len(self.faults) != 1 else ''}"
        lines = "\n".join(f"  {fault}" for fault in self.faults)
        super().__init__(f"{source}: {count} in the recipe; nothing was started\n{lines}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the arguments, as errors cross process borders."""
        return type(self), (self.source, self.faults)


class DataError(BadInputError):
    """A data set cannot be found, read or partitioned as asked."""


class ModelError(BadInputError):
    """A model cannot be built, or its layers do not fit the recipe."""


class ResourceError(BadInputError):
    """The cluster cannot hold the actors that the recipe asks for."""


class RunFolderError(BadInputError):
    """The run folder cannot be used."""


class RunError(RayfedError):
    """The run cannot go on; the last checkpoint is kept."""


class ClientError(RunError):
    """A client's local training raised an exception."""

    def __init__(
        self, client: int, round_index: int, trace: str, called: str | None = None
    ) -> None:
        """Keep whose training failed, when, the client's own traceback, and what to call it."""
        self.client = client
        self.round_index = round_index
        self.trace = trace
        self.called = f"client {client}" if called is None else called
        super().__init__(f"{self.called} failed in round {round_index}:\n{trace.rstrip()}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the arguments, as errors cross process borders."""
        return type(self), (self.client, self.round_index, self.trace, self.called)

    @property
    def reason(self) -> str:
        """The last line of the traceback: what was raised."""
        return self.trace.rstrip().rpartition("\n")[2]


class BlockMemoryError(RunError):
    """Clients do not fit into memory together; an executor trains smaller blocks then."""


class InterruptedRunError(RayfedError):
    """The user stopped the run."""

    exit_status = 130
