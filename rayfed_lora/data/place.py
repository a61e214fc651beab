"""Where a table's values come from, as messages name it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A source, or a column of it.

    Attributes:
        text: the key, the source and the column.
        files: name and number of rows of each file, in the order of the rows; empty where the
            source is one file.
    """

    text: str
    files: Sequence[tuple[str, int]] = ()

    def __str__(self) -> str:
        """Return the text."""
        return self.text

    def inside(self, what: str) -> Place:
        """Return the place of a part, such as a column.

        >>> str(Place("data.source 'a.csv'").inside("column 'text'"))
        "data.source 'a.csv', column 'text'"
        """
        return Place(f"{self.text}, {what}", self.files)

    def row(self, index: int) -> str:
        """Return the name of the row at an index from 0; its file's first row is 1.

        >>> Place("").row(4), Place("", [("a.csv", 3), ("b.csv", 9)]).row(4)
        ('row 5', 'row 2 of b.csv')
        """
        for name, rows in self.files:
            if index < rows:
                return f"row {index + 1} of {name}"
            index -= rows
        return f"row {index + 1}"
