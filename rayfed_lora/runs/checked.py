"""A run folder as reports, comparisons and exports read it. Source: this project."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from rayfed_lora.runs import checkpoints, checksums, seals
from rayfed_lora.storage import RunFolder


class CheckedFolder:
    """Gives files only where they are as they were written.

    The files of a finished run are checked against SHA256SUMS. Before that each file is checked
    against its own seal, and the newest checkpoint says which tables there must be, and how many
    rows they have at least.

    Attributes:
        folder: the run folder; files that links lead out of it are refused.
        unchecked: tables without any checksum, as older versions wrote them, that have been read.
    """

    def __init__(self, folder: RunFolder) -> None:
        """Read what the folder says of its files.

        Raises:
            RunFolderError: SHA256SUMS is damaged, or leads out of the folder.
        """
        self.folder = folder.confined()
        self.unchecked: list[str] = []
        sums = checksums.listed(self.folder)
        self._sums = sums or {}
        # Checkpoints are compared with, not shown.
        self._rows = checkpoints.saved_rows(folder) if sums is None else {}

    def exists(self, name: str) -> bool:
        """Return whether a file is there.

        Raises:
            RunFolderError: it is not, and should be.
        """
        if self.folder.exists(name):
            return True
        # Listed, and written after the list: the run has not finished.
        if name != checksums.SUMMARY_FILE and (name in self._sums or name in self._rows):
            raise seals.damaged(self.folder, name, "it is missing")
        return False

    def read(self, name: str) -> bytes:
        """Return a file's content.

        Raises:
            OSError: it cannot be read, and nothing says that it should be there.
            RunFolderError: it is damaged, or missing though it should be there.
        """
        return checksums.checked(self.folder, name, self._sums)

    def names(self, part: str) -> list[str]:
        """Return the names of the files in a sub-folder, those too that should be there."""
        prefix = f"{part}/"
        listed = {name[len(prefix) :] for name in self._sums if name.startswith(prefix)}
        return sorted({*self.folder.names(part), *listed})

    @contextmanager
    def opened(self, name: str) -> Iterator[pa.NativeFile]:
        """Open a table.

        Raises:
            RunFolderError: it is missing or damaged.
        """
        known = name in self._rows
        with seals.opened(self.folder, name, sha256=self._sums.get(name), sealed=known) as file:
            if known:
                rows = pq.read_metadata(file).num_rows
                if rows < self._rows[name]:
                    raise seals.damaged(
                        self.folder,
                        name,
                        f"it has {rows} rows, the last checkpoint knows of {self._rows[name]}",
                    )
            elif name not in self._sums and not seals.has_seal(file):
                self.unchecked.append(name)
            file.seek(0)
            yield file

    def table(self, name: str) -> pa.Table:
        """Return a whole table.

        Raises:
            ValueError: it is not a table.
            RunFolderError: it is missing or damaged.
        """
        with self.opened(name) as file:
            return pq.read_table(file)


def table(folder: RunFolder, name: str) -> pa.Table:
    """Return a checked table of a folder; raises as `CheckedFolder` does."""
    return CheckedFolder(folder).table(name)
