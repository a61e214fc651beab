"""The run folder: named files, each written whole or not at all, here or on any pyarrow filesystem.

Source: this project; the local write is the usual write, fsync, rename.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO

import pyarrow as pa
from pyarrow import fs

from rayfed_lora.errors import RunError, RunFolderError


class RunFolder:
    """A folder of files by relative name such as `checkpoints/round-000003/state.json`."""

    def __init__(self, location: str | Path) -> None:
        """Open the folder; nothing is made before the first write.

        Args:
            location: a local path or a URI that `pyarrow.fs` opens, e.g. `s3://bucket/runs/a`.

        Raises:
            RunFolderError: the URI cannot be opened.
        """
        self.location = str(location)
        try:
            if "://" in self.location:
                self._fs, root = fs.FileSystem.from_uri(self.location)
            else:
                self._fs, root = fs.LocalFileSystem(), os.path.abspath(self.location)
        except (OSError, ValueError) as error:
            raise RunFolderError(f"run folder {self.location}: {error}") from error
        self._root = PurePosixPath(root)

    @property
    def local(self) -> Path | None:
        """The folder as a local path, None where it is elsewhere."""
        return Path(self._root) if isinstance(self._fs, fs.LocalFileSystem) else None

    @property
    def name(self) -> str:
        """The last part of the folder's path."""
        return self._root.name

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all, durable on return.

        Raises:
            RunError: it cannot be written (no space, no permission).
        """
        with self.opened(name) as stream:
            stream.write(content)

    @contextmanager
    def opened(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file to be written piece by piece; it is there, whole, once the block is left.

        Raises:
            RunError: it cannot be written; what was there before is kept, as after any error.
        """
        target = str(self._root / name)
        try:
            if self.local is None:
                # An object store shows an upload once it is complete: what fails before must not
                # complete it.
                content = BytesIO()
                yield content
                with self._fs.open_output_stream(target) as stream:
                    stream.write(content.getbuffer())
            else:
                with _durable(Path(target)) as file:
                    yield file
        except OSError as error:
            raise RunError(f"cannot write {target}: {error.strerror or error}") from error

    def read(self, name: str) -> bytes:
        """Return a file's content.

        Raises:
            OSError: it is not there or cannot be read.
        """
        with self._fs.open_input_stream(str(self._root / name)) as stream:
            return bytes(stream.read())

    def source(self, name: str) -> pa.NativeFile:
        """Open a file to be read in parts.

        Raises:
            OSError: it is not there or cannot be read.
        """
        return self._fs.open_input_file(str(self._root / name))

    def exists(self, name: str) -> bool:
        """Return whether a file or folder of that name is there."""
        info = self._fs.get_file_info(str(self._root / name))
        return bool(info.type != fs.FileType.NotFound)

    def is_folder(self, name: str) -> bool:
        """Return whether a folder of that name is there."""
        info = self._fs.get_file_info(str(self._root / name))
        return bool(info.type == fs.FileType.Directory)

    def names(self, folder: str = "") -> list[str]:
        """Return the names directly inside a sub-folder, sorted; none where it is not there."""
        selector = fs.FileSelector(str(self._root / folder), allow_not_found=True)
        return sorted(info.base_name for info in self._fs.get_file_info(selector))

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all in it, if it is there."""
        info = self._fs.get_file_info(str(self._root / name))
        if info.type == fs.FileType.Directory:
            self._fs.delete_dir(info.path)
        elif info.type == fs.FileType.File:
            self._fs.delete_file(info.path)

    def check_writable(self) -> None:
        """Write and remove an empty file, and local folders that were not there before.

        Raises:
            RunFolderError: the folder cannot be made or written.
        """
        probe = f".writable-{os.getpid()}"
        above = [] if self.local is None else [self.local, *self.local.parents]
        made = [folder for folder in above if not folder.exists()]
        try:
            self.write(probe, b"")
            self.remove(probe)
            for folder in made:
                folder.rmdir()
        except (RunError, OSError) as error:
            raise RunFolderError(
                f"run folder {self.location}: expected a folder that can be written; {error}"
            ) from error


@contextmanager
def _durable(target: Path) -> Iterator[IO[bytes]]:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
