"""Numbered lease files of a folder: `.owner-1.json`, `.owner-2.json`, ...; the highest one counts.

A file is created by exactly one of several processes that try at once: by O_EXCL on a mounted
filesystem, by conditional writes on S3, by best effort elsewhere. What fails raises OSError.

Source: this project; POSIX open(2); Amazon S3 User Guide, "Conditional requests".
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
from typing import Protocol

from pyarrow import fs

from rayfed_lora.errors import RayfedError
from rayfed_lora.storage import RunFolder

_NAME = re.compile(r"\.owner-([1-9][0-9]*)\.json")
_GONE = {errno.ENOENT, errno.ESTALE}
# How long a file is left alone before it is read back, where nothing better can be had.
_SETTLE_S = 2.0
_TRIES = 10
NO_BOTO3 = (
    "boto3 is not installed (pip install 'rayfed-lora[aws]'): two runs that are started into one"
    " s3:// folder in the same moment may not notice each other"
)
NO_CONDITIONS = (
    "the object store has no conditional writes: two runs that are started into one folder in the"
    " same moment may not notice each other"
)


class LeaseFiles(Protocol):
    """The lease files of one folder.

    Attributes:
        remote: a look at a file takes a request.
        note: what the user should know of this kind of storage, or None.
    """

    remote: bool
    note: str | None

    def numbers(self) -> list[int]:
        """Return the numbers of all files, ascending."""

    def read(self, number: int) -> bytes | None:
        """Return a file's content, None where it is gone."""

    def create(self, number: int, content: bytes) -> bool:
        """Create a file; return False, and change nothing, where it is there."""

    def rewrite(self, number: int, old: bytes, new: bytes) -> bool:
        """Replace `old` by `new`, of the same length; False where the file is gone or differs."""

    def remove(self, number: int) -> None:
        """Remove a file if it is there, on S3 only where it is as this object saw it last."""

    def tidy(self) -> None:
        """Remove the folders that `create` made and that are empty."""


def is_lease_file(name: str) -> bool:
    """Return whether a file of a run folder is part of its lease.

    >>> is_lease_file(".owner-12.json"), is_lease_file("recipe.yaml")
    (True, False)
    """
    return _NAME.fullmatch(name) is not None


def lease_files(folder: RunFolder) -> LeaseFiles:
    """Return the lease files of a folder, by the surest means that its storage has."""
    if folder.local is not None:
        return MountedFiles(folder.local)
    if not isinstance(folder.place[0], fs.S3FileSystem):
        return PlainFiles(folder)
    try:
        import boto3  # noqa: F401
    except ImportError:
        return PlainFiles(folder, NO_BOTO3)
    from rayfed_lora.runs.lease_files_s3 import S3Files

    return S3Files(*folder.place)


def file_name(number: int) -> str:
    """Return the name of a lease file."""
    return f".owner-{number}.json"


def numbers_in(names: list[str]) -> list[int]:
    """Return the numbers of the lease files among some names, ascending."""
    found = map(_NAME.fullmatch, names)
    return sorted(int(match[1]) for match in found if match is not None)


class MountedFiles:
    """On a local or network filesystem: O_CREAT | O_EXCL is atomic on both."""

    remote = False
    note: str | None = None

    def __init__(self, folder: Path) -> None:
        """Keep the folder; nothing is made before the first file."""
        self._folder = folder
        self._made: list[Path] = []

    def numbers(self) -> list[int]:
        """Return the numbers of all files, ascending."""
        try:
            return numbers_in(os.listdir(self._folder))
        except FileNotFoundError:
            return []

    def read(self, number: int) -> bytes | None:
        """Return a file's content, None where it is gone."""
        handle = self._opened(number, os.O_RDONLY)
        if handle is None:
            return None
        with os.fdopen(handle, "rb") as file:
            return file.read()

    def create(self, number: int, content: bytes) -> bool:
        """Create a file; return False, and change nothing, where it is there."""
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
            # The disk is full: an empty file would stand for an owner.
            self.remove(number)
            raise
        finally:
            os.close(handle)
        return True

    def _created(self, number: int) -> int:
        path = self._path(number)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        for _ in range(_TRIES):
            # Another process may remove the empty folder in between.
            with suppress(FileNotFoundError):
                path.parent.mkdir(parents=True, exist_ok=True)
                return os.open(path, flags, 0o644)
        return os.open(path, flags, 0o644)

    def rewrite(self, number: int, old: bytes, new: bytes) -> bool:
        """Replace `old` by `new` in place: a file that another process removed stays away."""
        handle = self._opened(number, os.O_RDWR)
        if handle is None:
            return False
        try:
            if os.read(handle, len(old) + 1) != old:
                return False
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, new)
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
            # Without O_NONBLOCK a pipe is waited for.
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
        """Remove a file if it is there."""
        self._path(number).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove the folders that `create` made and that are empty."""
        with suppress(OSError):
            for path in self._made:
                path.rmdir()

    def _path(self, number: int) -> Path:
        return self._folder / file_name(number)


class NoConditionalWritesError(OSError):
    """The object store refuses conditions."""


class PlainFiles:
    """On other storage, by best effort: write, wait, read back."""

    remote = True

    def __init__(
        self, folder: RunFolder, note: str | None = None, settle_s: float = _SETTLE_S
    ) -> None:
        """Keep the folder.

        Args:
            folder: the run folder.
            note: what the user should know.
            settle_s: how long a new file is left alone before it is read back.
        """
        self.note = note
        self._folder = folder
        self._settle_s = settle_s
        self._made = False

    def numbers(self) -> list[int]:
        """Return the numbers of all files, ascending."""
        with _read_errors():
            return numbers_in(self._folder.names())

    def read(self, number: int) -> bytes | None:
        """Return a file's content, None where it is gone."""
        try:
            return self._folder.read(file_name(number))
        except FileNotFoundError:
            return None

    def create(self, number: int, content: bytes) -> bool:
        """Create a file and see whether it stays; return False where another one is there."""
        with _read_errors():
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
        with _read_errors():
            self._folder.write(file_name(number), new)
        return True

    def remove(self, number: int) -> None:
        """Remove a file if it is there."""
        with _read_errors():
            self._folder.remove(file_name(number))

    def tidy(self) -> None:
        """Remove the mark of an empty folder that was not there before."""
        with suppress(RayfedError):
            if self._made and not self._folder.names():
                self._folder.remove("")


@contextmanager
def _read_errors() -> Iterator[None]:
    try:
        yield
    except RayfedError as error:
        raise OSError(str(error)) from error
