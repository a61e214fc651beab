"""Lease files on a local or network filesystem, where O_CREAT | O_EXCL is atomic.

Source: this project; POSIX open(2).
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from rayfed_lora.runs.leases.files import file_name, numbers_in

_GONE = {errno.ENOENT, errno.ESTALE}
_TRIES = 10


class MountedFiles:
    """Lease files of a mounted folder; see `LeaseFiles`."""

    remote = False
    note: str | None = None

    def __init__(self, folder: Path) -> None:
        """Keep the folder; it is made with the first file."""
        self._folder = folder
        self._made: list[Path] = []

    def numbers(self) -> list[int]:
        """Return the numbers of all files, ascending."""
        try:
            return numbers_in(os.listdir(self._folder))
        except FileNotFoundError:
            return []

    def read(self, number: int) -> bytes | None:
        """Return a file's content, None where the file is gone."""
        handle = self._opened(number, os.O_RDONLY)
        if handle is None:
            return None
        with os.fdopen(handle, "rb") as file:
            return file.read()

    def create(self, number: int, content: bytes) -> bool:
        """Create a file; return False, and change nothing, where it exists."""
        if not self._made:
            above = [self._folder, *self._folder.parents]
            self._made = [path for path in above if not path.exists()]
        try:
            handle = self._created(number)
        except FileExistsError:
            return False
        try:
            os.write(handle, content)
        except OSError:
            # The disk is full: an empty file would look like an owner.
            self.remove(number)
            raise
        finally:
            os.close(handle)
        return True

    def _created(self, number: int) -> int:
        path = self._path(number)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        for _ in range(_TRIES):
            # Another process may remove the empty folder between these two calls.
            with suppress(FileNotFoundError):
                path.parent.mkdir(parents=True, exist_ok=True)
                return os.open(path, flags, 0o644)
        return os.open(path, flags, 0o644)

    def rewrite(self, number: int, old: bytes, new: bytes) -> bool:
        """Replace `old` by `new` in place: a removed file is not created again."""
        handle = self._opened(number, os.O_RDWR)
        if handle is None:
            return False
        try:
            if os.read(handle, len(old) + 1) != old:
                return False
            os.pwrite(handle, new, 0)
        finally:
            os.close(handle)
        return True

    def _opened(self, number: int, flags: int) -> int | None:
        """Open a regular file, None where it is gone.

        Raises:
            OSError: it is a link, a pipe, or anything else.
        """
        path = self._path(number)
        try:
            # Without O_NONBLOCK, opening a pipe blocks.
            handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(f"expected a regular file, {path} is none")
        return handle

    def remove(self, number: int) -> None:
        """Remove a file if it exists."""
        self._path(number).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove the folders that `create` made and that are empty."""
        with suppress(OSError):
            for path in self._made:
                path.rmdir()

    def _path(self, number: int) -> Path:
        return self._folder / file_name(number)
