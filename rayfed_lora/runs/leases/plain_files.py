"""Lease files on storage without atomic creation: write, wait, read back. Source: this project."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rayfed_lora.errors import RayfedError
from rayfed_lora.runs.leases.files import file_name, numbers_in
from rayfed_lora.storage import RunFolder

_SETTLE_S = 2.0


class PlainFiles:
    """Lease files by best effort; see `LeaseFiles`."""

    remote = True

    def __init__(
        self, folder: RunFolder, note: str | None = None, settle_s: float | None = None
    ) -> None:
        """Keep the folder.

        Args:
            folder: the run folder.
            note: a warning for the user.
            settle_s: seconds between writing a new file and reading it back; default 2.
        """
        self.note = note
        self._folder = folder
        self._settle_s = _SETTLE_S if settle_s is None else settle_s
        self._made = False

    def numbers(self) -> list[int]:
        """Return the numbers of all files, ascending."""
        with _as_os_errors():
            return numbers_in(self._folder.names())

    def read(self, number: int) -> bytes | None:
        """Return a file's content, None where the file is gone."""
        try:
            return self._folder.read(file_name(number))
        except FileNotFoundError:
            return None

    def create(self, number: int, content: bytes) -> bool:
        """Create a file and read it back; return False where another process's file is there."""
        with _as_os_errors():
            if self._folder.exists(file_name(number)):
                return False
            self._made = self._made or not self._folder.exists("")
            self._folder.write(file_name(number), content)
        time.sleep(self._settle_s)
        return self.read(number) == content

    def rewrite(self, number: int, old: bytes, new: bytes) -> bool:
        """Replace `old` by `new`; False where the file is gone or differs."""
        if self.read(number) != old:
            return False
        with _as_os_errors():
            self._folder.write(file_name(number), new)
        return True

    def remove(self, number: int) -> None:
        """Remove a file if it exists."""
        with _as_os_errors():
            self._folder.remove(file_name(number))

    def tidy(self) -> None:
        """Remove the marker of an empty folder that did not exist before."""
        with suppress(RayfedError):
            if self._made and not self._folder.names():
                self._folder.remove("")


@contextmanager
def _as_os_errors() -> Iterator[None]:
    try:
        yield
    except RayfedError as error:
        raise OSError(str(error)) from error
