"""Numbered lease files of a folder: `.owner-1.json`, `.owner-2.json`, ...; the highest one counts.

When several processes create a file at once, exactly one of them succeeds: by O_EXCL on a mounted
filesystem, by conditional writes on S3, by best effort elsewhere. All failures are OSErrors.

Source: this project.
"""

from __future__ import annotations

import re
from typing import Protocol

_NAME = re.compile(r"\.owner-([1-9][0-9]*)\.json")


class LeaseFiles(Protocol):
    """The lease files of one folder.

    Attributes:
        remote: each read is a request over the network.
        note: a warning for the user about this kind of storage, or None.
    """

    remote: bool
    note: str | None

    def numbers(self) -> list[int]:
        """Return the numbers of all files, ascending."""

    def read(self, number: int) -> bytes | None:
        """Return a file's content, None where the file is gone."""

    def create(self, number: int, content: bytes) -> bool:
        """Create a file; return False, and change nothing, where it exists."""

    def rewrite(self, number: int, old: bytes, new: bytes) -> bool:
        """Replace `old` by `new`, of the same length; False where the file is gone or differs."""

    def remove(self, number: int) -> None:
        """Remove a file if it exists; on S3 only if unchanged since this object last used it."""

    def tidy(self) -> None:
        """Remove the folders that `create` made and that are empty."""


class NoConditionalWritesError(OSError):
    """The object store rejects conditional requests."""


def file_name(number: int) -> str:
    """Return the name of a lease file."""
    return f".owner-{number}.json"


def is_lease_file(name: str) -> bool:
    """Return whether a file of a run folder is a lease file.

    >>> is_lease_file(".owner-12.json"), is_lease_file("recipe.yaml")
    (True, False)
    """
    return _NAME.fullmatch(name) is not None


def numbers_in(names: list[str]) -> list[int]:
    """Return the numbers of the lease files among some names, ascending."""
    found = map(_NAME.fullmatch, names)
    return sorted(int(match[1]) for match in found if match is not None)
