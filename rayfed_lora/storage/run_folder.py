"""A folder of named files, each written whole or not at all: POSIX rename(2), fsync(2)."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path, PurePath, PurePosixPath
from typing import IO
from uuid import uuid4

import pyarrow as pa
from pyarrow import fs

from rayfed_lora.errors import RunError, RunFolderError
from rayfed_lora.locations import check_name
from rayfed_lora.storage.filesystems import credentials_hint, open_filesystem, refuse_secrets

_CHUNK = 1 << 23
# Errors of filesystems that lack an operation, e.g. fsync of folders on a network filesystem.
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)
# Errors of a folder that another process uses or has removed.
_SHARED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
_TRIES = 5
_SCRATCH = ".scratch"


class RunFolder:
    """Files by relative name such as `checkpoints/round-000003/state.json`.

    The folder is on a local disk or on any filesystem of pyarrow. Every method that takes a name
    raises RunFolderError where the name, or in a confined folder a link, leads out of the folder.
    """

    def __init__(self, location: str | Path) -> None:
        """Open the folder; it is made with the first file.

        `location` is a local path or a URI that `pyarrow.fs` opens, e.g. `s3://bucket/runs/a`.
        Raises a RunFolderError where it cannot be opened, or has credentials in it.
        """
        self.location = str(location)
        refuse_secrets(self.location)
        try:
            self._fs, root = open_filesystem(self.location)
        except (OSError, ValueError) as error:
            raise RunFolderError(f"run folder {self.location}: {error}") from error
        self._root = PurePosixPath(root)
        self._check: Callable[[], None] = lambda: None
        self._confined = False

    def guarded(self, check: Callable[[], None]) -> RunFolder:
        """Return the same folder, which calls `check` before each change.

        That is: when a file is complete but does not have its name yet, and before a file is
        removed. An error that `check` raises prevents the change.
        """
        other = copy(self)
        other._check = check
        return other

    def confined(self) -> RunFolder:
        """Return the same folder, which rejects files whose links lead out of it.

        For reading folders of unknown origin: a link could show another file of the user. The
        user's own runs may have parts of their folder on another disk.
        """
        other = copy(self)
        other._confined = True
        return other

    @property
    def place(self) -> tuple[fs.FileSystem, str]:
        """The filesystem, and the folder's path in it."""
        return self._fs, str(self._root)

    @property
    def local(self) -> Path | None:
        """The folder as a local path, None where it is on another filesystem."""
        return Path(self._root) if isinstance(self._fs, fs.LocalFileSystem) else None

    @property
    def name(self) -> str:
        """The last part of the folder's path."""
        return self._root.name

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all, durable on return.

        Raises RunError where it cannot be written (no space, no permission).
        """
        with self.open_to_write(name) as stream:
            stream.write(content)

    @contextmanager
    def open_to_write(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file to be written in parts; it has its name, whole, once the block ends.

        Raises RunError where it cannot be written; as after any error, what was there before is
        kept.
        """
        target = self._path(name)
        try:
            with (
                self._uploading(target) if self.local is None else _replacing(Path(target)) as file
            ):
                yield file
                self._check()
        except OSError as error:
            raise RunError(f"cannot write {target}: {error.strerror or error}") from error

    @contextmanager
    def _uploading(self, target: str) -> Iterator[IO[bytes]]:
        def upload() -> None:
            with self._fs.open_output_stream(target) as stream:
                shutil.copyfileobj(content, stream, _CHUNK)

        with tempfile.TemporaryFile() as content:
            yield content
            content.seek(0)
            # An object store shows a closed stream as a complete file, so the upload runs in a
            # thread of its own, which no SIGINT interrupts.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(upload).result()

    def read(self, name: str) -> bytes:
        """Return a file's content; OSError: it cannot be read, RunFolderError: it is no file."""
        with self._fs.open_input_stream(self._file(name)) as stream:
            return bytes(stream.read())

    def open_to_read(self, name: str) -> pa.NativeFile:
        """Open a file to be read in parts; raises as `read` does."""
        return self._fs.open_input_file(self._file(name))

    def exists(self, name: str) -> bool:
        """Return whether a file or folder of that name exists.

        Raises RunFolderError where the storage gives no answer; so do the methods that follow.
        """
        return bool(self._info(name).type != fs.FileType.NotFound)

    def is_folder(self, name: str) -> bool:
        """Return whether a folder of that name exists."""
        return bool(self._info(name).type == fs.FileType.Directory)

    def names(self, folder: str = "") -> list[str]:
        """Return the names directly inside a sub-folder, sorted; none where it does not exist."""
        selector = fs.FileSelector(self._path(folder), allow_not_found=True)
        # Another process may remove the folder meanwhile.
        with self._folder_errors(), suppress(FileNotFoundError):
            return sorted(info.base_name for info in self._fs.get_file_info(selector))
        return []

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its content, if it exists."""
        self._check()
        info = self._info(name)
        # Another process may remove it meanwhile.
        with self._folder_errors(), suppress(FileNotFoundError):
            if info.type == fs.FileType.Directory:
                self._fs.delete_dir(info.path)
            elif info.type == fs.FileType.File:
                self._fs.delete_file(info.path)

    def remove_scratch(self) -> None:
        """Remove scratch files that killed writes have left; for the only writer of the folder."""
        if self.local is not None:
            for path in self.local.rglob(f".*{_SCRATCH}"):
                with suppress(OSError):
                    path.unlink()

    def check_writable(self) -> None:
        """Write and remove an empty file, and the folders made for it; raises RunFolderError."""
        probe = f".writable-{uuid4().hex}"
        made = self.missing_folders()
        try:
            for _ in range(_TRIES):
                # The check of another command may have removed the folder that both had made.
                with suppress(RunError):
                    self.write(probe, b"")
                    break
            else:
                self.write(probe, b"")
            self.remove(probe)
            self.remove_empty(made)
        except (RunError, OSError) as error:
            raise RunFolderError(
                f"run folder {self.location}: expected a folder that can be written; {error}"
                f"{credentials_hint(self.location, self._fs)}"
            ) from error

    def missing_folders(self) -> list[PurePath]:
        """Return the folders that the first file will make, this one first."""
        if self.local is None:
            return [] if self.exists("") else [self._root]
        folders = [self.local, *self.local.parents]
        return [folder for folder in folders if not os.path.exists(folder)]

    def remove_empty(self, folders: Sequence[PurePath]) -> None:
        """Remove the folders that `missing_folders` returned, as far as they are empty."""
        if self.local is not None:
            for folder in folders:
                with _ignoring(_SHARED):
                    os.rmdir(folder)
        elif folders and not self.names():
            # An object store keeps a marker of an empty folder.
            self.remove("")

    def _path(self, name: str) -> str:
        try:
            check_name(name)
        except ValueError as error:
            raise RunFolderError(f"run folder {self.location}: {error}") from None
        path = str(self._root / name)
        if self._confined and self.local is not None:
            real, root = os.path.realpath(path), os.path.realpath(self._root)
            if real != root and not real.startswith(root.rstrip(os.sep) + os.sep):
                raise RunFolderError(
                    f"run folder {self.location}: expected files of its own, {name} is a link that"
                    f" leads out of it, to {real}"
                )
        return path

    def _file(self, name: str) -> str:
        """Return the path of a file to be read: opening anything else, e.g. a pipe, may block."""
        path = self._path(name)
        if self.local is not None and os.path.exists(path) and not os.path.isfile(path):
            kind = "a folder" if os.path.isdir(path) else "no regular file"
            raise RunFolderError(f"run folder {self.location}: expected a file, {name} is {kind}")
        return path

    def _info(self, name: str) -> fs.FileInfo:
        path = self._path(name)
        with self._folder_errors():
            return self._fs.get_file_info(path)

    @contextmanager
    def _folder_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunFolderError(
                f"run folder {self.location}: expected a folder that can be read and changed;"
                f" {error.strerror or error}{credentials_hint(self.location, self._fs)}"
            ) from error


@contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    """Open a local file to be written; a scratch file is synced and renamed once the block ends."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(
        suffix=_SCRATCH, prefix=f".{target.name}.", dir=target.parent
    )
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            with _ignoring(_NOT_SUPPORTED):
                os.fsync(stream.fileno())
        with _ignoring(_NOT_SUPPORTED):
            os.chmod(scratch, 0o644)
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    with _ignoring(_NOT_SUPPORTED):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _ignoring(codes: Collection[int]) -> Iterator[None]:
    """Ignore an OSError whose errno is one of `codes`."""
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise
