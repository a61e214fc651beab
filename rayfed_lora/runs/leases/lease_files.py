"""Numbered lease files of a folder: `.owner-1.json`, `.owner-2.json`, ...; the highest one counts.

When several processes create a file at once, exactly one of them succeeds: by O_EXCL on a mounted
filesystem, by conditional writes on S3 (`s3_files`), by write, wait and read back elsewhere. Each
kind has `remote` (a read is a request over the network), `note` (a warning for the user about this
storage) and the methods of `MountedFiles`. All failures are OSErrors.

Source: this project; POSIX open(2).
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rayfed_lora.errors import RayfedError
from rayfed_lora.storage import RunFolder

_NAME = re.compile(r"\.owner-([1-9][0-9]*)\.json")
_GONE = {errno.ENOENT, errno.ESTALE}
_TRIES = 10
# Between writing a new file and reading it back.
_SETTLE_S = 2.0


def file_name(number: int) -> str:
    """Return the name of a lease file."""
    return f".owner-{number}.json"


def is_lease_file(name: str) -> bool:
    """Return whether a file of a run folder is a lease file.

    >>> is_lease_file(".owner-12.json"), is_lease_file("recipe.yaml")
    (True, False)
    """
    return _NAME.fullmatch(name) is not None


@contextmanager
def _as_os_errors() -> Iterator[None]:
    try:
        yield
    except RayfedError as error:
        raise OSError(str(error.__cause__ or error)) from error


@_as_os_errors()
def numbers_in(folder: RunFolder) -> list[int]:
    """Return the numbers of all lease files, ascending."""
    try:
        # pyarrow does not list links that lead nowhere.
        names = folder.names() if folder.local is None else os.listdir(folder.local)
    except FileNotFoundError:
        return []
    found = map(_NAME.fullmatch, names)
    return sorted(int(match[1]) for match in found if match is not None)


class MountedFiles:
    """Lease files on a local or network filesystem."""

    remote = False
    note: str | None = None

    def __init__(self, folder: Path) -> None:
        """Keep the folder; it is made with the first file."""
        self._folder = folder

    def read(self, number: int) -> bytes | None:
        """Return a file's content, None where the file is gone."""
        handle = self._opened(number, os.O_RDONLY)
        if handle is None:
            return None
        with os.fdopen(handle, "rb") as file:
            return file.read()

    def create(self, number: int, content: bytes) -> bool:
        """Create a file; return False, and change nothing, where it exists."""
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
        path, flags = self._folder / file_name(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY
        for _ in range(_TRIES):
            # Another process may remove the empty folder between these two calls.
            with suppress(FileNotFoundError):
                path.parent.mkdir(parents=True, exist_ok=True)
                return os.open(path, flags, 0o644)
        return os.open(path, flags, 0o644)

    def rewrite(self, number: int, old: bytes, new: bytes) -> bool:
        """Replace `old` by `new`, of the same length; False where the file is gone or differs."""
        # In place: a removed file is not created again.
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
        """Open a regular file, None where it is gone; a link or a pipe is an OSError."""
        path = self._folder / file_name(number)
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
        """Remove a file if it exists; on S3 only if unchanged since this object last used it."""
        (self._folder / file_name(number)).unlink(missing_ok=True)


class PlainFiles:
    """Lease files on storage without atomic creation, by best effort; see `MountedFiles`."""

    remote = True

    def __init__(self, folder: RunFolder, note: str | None = None) -> None:
        """Keep the folder; `note` is a warning for the user."""
        self.note = note
        self._folder = folder

    def read(self, number: int) -> bytes | None:
        """Return a file's content, None where the file is gone."""
        try:
            return self._folder.read(file_name(number))
        except FileNotFoundError:
            return None

    @_as_os_errors()
    def create(self, number: int, content: bytes) -> bool:
        """Create a file and read it back; return False where another process's file is there."""
        if self._folder.exists(file_name(number)):
            return False
        self._folder.write(file_name(number), content)
        time.sleep(_SETTLE_S)
        return self.read(number) == content

    @_as_os_errors()
    def rewrite(self, number: int, old: bytes, new: bytes) -> bool:
        """Replace `old` by `new`; False where the file is gone or differs."""
        if self.read(number) != old:
            return False
        self._folder.write(file_name(number), new)
        return True

    @_as_os_errors()
    def remove(self, number: int) -> None:
        """Remove a file if it exists."""
        self._folder.remove(file_name(number))
