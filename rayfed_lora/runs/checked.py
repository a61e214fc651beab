"""A run folder that checks what it reads, for reports and comparisons. Source: this project."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from rayfed_lora.runs import checkpoints, checksums, seals
from rayfed_lora.runs.seals import damaged
from rayfed_lora.storage import RunFolder


class CheckedFolder:
    """A run folder that returns undamaged files only.

    The files of a finished run are checked against SHA256SUMS. In an unfinished run each table is
    checked against its own seal, and the newest checkpoint says which tables must exist, and how
    many rows they have at least.

    Attributes:
        folder: the run folder; files whose links lead out of it are rejected.
        unchecked: tables without any checksum, of older versions, that were read.
    """

    def __init__(self, folder: RunFolder) -> None:
        """Read the checksums, or the row counts of the newest checkpoint; raises RunFolderError."""
        self.folder = folder.confined()
        self.unchecked: list[str] = []
        sums = checksums.listed(self.folder)
        self._sums = sums or {}
        # Not from the confined folder: checkpoints are compared with, never shown.
        self._rows = checkpoints.saved_rows(folder) if sums is None else {}

    def exists(self, name: str) -> bool:
        """Return whether a file exists; a RunFolderError where it does not, but must."""
        if self.folder.exists(name):
            return True
        # summary.json is listed, but written after the list: without it the run is unfinished.
        if name != checksums.SUMMARY_FILE and (name in self._sums or name in self._rows):
            raise damaged(self.folder, name, "it is missing")
        return False

    def read(self, name: str) -> bytes:
        """Return a file's content; raises OSError, or where it is listed RunFolderError."""
        return checksums.checked(self.folder, name, self._sums)

    def names(self, part: str) -> list[str]:
        """Return the names of the files in a sub-folder, listed ones that are missing included."""
        prefix = f"{part}/"
        listed = {name.removeprefix(prefix) for name in self._sums if name.startswith(prefix)}
        return sorted({*self.folder.names(part), *listed})

    @contextmanager
    def open(self, name: str) -> Iterator[pa.NativeFile]:
        """Open a table, or any listed file; a RunFolderError where it is missing or damaged."""
        saved, sha256 = self._rows.get(name), self._sums.get(name)
        required = saved is not None
        with seals.open_table(self.folder, name, sha256=sha256, seal_required=required) as file:
            if saved is not None:
                rows = pq.read_metadata(file).num_rows
                if rows < saved:
                    reason = f"it has {rows} rows, the last checkpoint knows of {saved}"
                    raise damaged(self.folder, name, reason)
            elif sha256 is None and not seals.has_seal(file):
                self.unchecked.append(name)
            file.seek(0)
            yield file

    def table(self, name: str) -> pa.Table:
        """Return a whole table; raises as `open`, and ValueError where it is none."""
        with self.open(name) as file:
            return pq.read_table(file)


def table(folder: RunFolder, name: str) -> pa.Table:
    """Return a checked table of a folder; raises as `CheckedFolder.table` does."""
    return CheckedFolder(folder).table(name)
