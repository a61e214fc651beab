"""Values of a recipe that are each valid and do not go together. Source: this project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Conflict:
    """Values that do not go together.

    Attributes:
        paths: the keys involved, the one to change first.
        message: the expected value, and the given one.
    """

    paths: tuple[str, ...]
    message: str


class ConflictError(ValueError):
    """Carries every conflict of a recipe through pydantic."""

    def __init__(self, conflicts: Sequence[Conflict]) -> None:
        """Word one message that lists all of them."""
        self.conflicts = tuple(conflicts)
        super().__init__("; ".join(f"{c.paths[0]}: {c.message}" for c in self.conflicts))
