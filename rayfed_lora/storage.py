"""The run folder: named files, each written whole or not at all, here or on any pyarrow filesystem.

Source: this project; the local write is the usual write, fsync, rename.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import parse_qsl, unquote, urlsplit
from uuid import uuid4

import pyarrow as pa
from pyarrow import fs

from rayfed_lora.endpoints import anonymous, s3_endpoint
from rayfed_lora.errors import RunError, RunFolderError
from rayfed_lora.locations import check_name, holds_secret, is_uri, repeated_option

# Of an S3 URI, as pyarrow's own.
_S3_OPTIONS = ("region", "endpoint_override", "scheme", "tls_ca_file_path")
# Our own; see `endpoints`.
_ANONYMOUS = "anonymous"
_S3_HINT = (
    "credentials come from the environment, ~/.aws or the machine's role; region and endpoint from"
    " ?region=...&endpoint_override=...&scheme=http in the URI, or AWS_ENDPOINT_URL"
)
_ANONYMOUS_HINT = (
    "requests to this endpoint carry no credentials, since only the recipe names it:"
    " AWS_ENDPOINT_URL_S3, RAYFED_LORA_ENDPOINTS, --out or --set names it as yours"
)
# It becomes a part of a host's name.
_REGION = re.compile(r"[A-Za-z0-9-]*")
# A store that does not answer is given up after about ten seconds.
_S3_ATTEMPTS = 3
_CHUNK = 1 << 23
# What a filesystem says that has no such operation.
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM}


class RunFolder:
    """A folder of files by relative name such as `checkpoints/round-000003/state.json`."""

    def __init__(self, location: str | Path) -> None:
        """Open the folder; nothing is made before the first write.

        Args:
            location: a local path or a URI that `pyarrow.fs` opens, e.g. `s3://bucket/runs/a`.

        Raises:
            RunFolderError: the URI cannot be opened, or has credentials in it.
        """
        self.location = str(location)
        refuse_secrets(self.location)
        try:
            self._fs, root = opened(self.location)
        except (OSError, ValueError) as error:
            raise RunFolderError(f"run folder {self.location}: {error}") from error
        self._root = PurePosixPath(root)
        self._check: Callable[[], None] = _unguarded
        self._confined = False

    def guarded(self, check: Callable[[], None]) -> RunFolder:
        """Return the same folder, which calls `check` before each change; what it raises ends it.

        Args:
            check: called when a file is complete and about to be seen under its name, and before
                one is removed.
        """
        other = copy(self)
        other._check = check
        return other

    def confined(self) -> RunFolder:
        """Return the same folder, which refuses files that links lead out of it.

        A folder from a stranger is read by it: what a link shows would be another file of the
        user's. The user's own runs may have parts of their folder on another disk.
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
        target = self._path(name)
        try:
            with self._uploaded(target) if self.local is None else _durable(Path(target)) as file:
                yield file
                self._check()
        except OSError as error:
            raise RunError(f"cannot write {target}: {error.strerror or error}") from error

    @contextmanager
    def _uploaded(self, target: str) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryFile() as content:
            yield content
            content.seek(0)
            # An object store shows an upload once it is complete, and a stream that is closed is a
            # complete one: in a thread of its own, where no SIGINT can come between.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(_upload, self._fs, target, content).result()

    def read(self, name: str) -> bytes:
        """Return a file's content.

        Raises:
            OSError: it is not there or cannot be read.
            RunFolderError: it is no file, or leads out of a confined folder.
        """
        with self._fs.open_input_stream(self._file(name)) as stream:
            return bytes(stream.read())

    def source(self, name: str) -> pa.NativeFile:
        """Open a file to be read in parts.

        Raises:
            OSError: it is not there or cannot be read.
            RunFolderError: it is no file, or leads out of a confined folder.
        """
        return self._fs.open_input_file(self._file(name))

    def exists(self, name: str) -> bool:
        """Return whether a file or folder of that name is there.

        Raises:
            RunFolderError: that cannot be known; so do the methods that follow.
        """
        return bool(self._info(name).type != fs.FileType.NotFound)

    def is_folder(self, name: str) -> bool:
        """Return whether a folder of that name is there."""
        return bool(self._info(name).type == fs.FileType.Directory)

    def names(self, folder: str = "") -> list[str]:
        """Return the names directly inside a sub-folder, sorted; none where it is not there."""
        selector = fs.FileSelector(self._path(folder), allow_not_found=True)
        found = self._asked(lambda: self._fs.get_file_info(selector))
        return sorted(info.base_name for info in found)

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all in it, if it is there."""
        self._check()
        info = self._info(name)

        def ask() -> None:
            # Another process may remove it in between.
            with suppress(FileNotFoundError):
                if info.type == fs.FileType.Directory:
                    self._fs.delete_dir(info.path)
                elif info.type == fs.FileType.File:
                    self._fs.delete_file(info.path)

        self._asked(ask)

    def check_writable(self) -> None:
        """Write and remove an empty file, and folders that were not there before.

        Raises:
            RunFolderError: the folder cannot be made or written.
        """
        probe = f".writable-{uuid4().hex}"
        above = [] if self.local is None else [self.local, *self.local.parents]
        made = [folder for folder in above if not folder.exists()]
        there = self.exists("")
        try:
            try:
                self.write(probe, b"")
            except RunError:
                # Another command has ended its probe, and removed the folder that both had made.
                self.write(probe, b"")
            self.remove(probe)
            for folder in made:
                with _where_shared():
                    folder.rmdir()
            if not there and not self.names():
                # An object store has got a mark of an empty folder.
                self.remove("")
        except (RunError, OSError) as error:
            raise RunFolderError(
                f"run folder {self.location}: expected a folder that can be written; {error}"
                f"{self._hint}"
            ) from error

    def _path(self, name: str) -> str:
        try:
            check_name(name)
        except ValueError as error:
            raise RunFolderError(f"run folder {self.location}: {error}") from None
        path = str(self._root / name)
        if self._confined and self.local is not None:
            led = os.path.realpath(path)
            root = os.path.realpath(self._root)
            if led != root and not led.startswith(root.rstrip(os.sep) + os.sep):
                raise RunFolderError(
                    f"run folder {self.location}: expected files of its own, {name} is a link that"
                    f" leads out of it, to {led}"
                )
        return path

    def _file(self, name: str) -> str:
        """Return where a file to be read is: nothing else, such as a pipe, is waited for."""
        path = self._path(name)
        if self.local is not None and os.path.exists(path) and not os.path.isfile(path):
            kind = "a folder" if os.path.isdir(path) else "no regular file"
            raise RunFolderError(f"run folder {self.location}: expected a file, {name} is {kind}")
        return path

    def _info(self, name: str) -> fs.FileInfo:
        path = self._path(name)
        return self._asked(lambda: self._fs.get_file_info(path))

    def _asked(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except OSError as error:
            raise RunFolderError(
                f"run folder {self.location}: expected a folder that can be read and changed;"
                f" {error.strerror or error}{self._hint}"
            ) from error

    @property
    def _hint(self) -> str:
        if anonymous(self.location):
            return f" ({_ANONYMOUS_HINT})"
        return f" ({_S3_HINT})" if isinstance(self._fs, fs.S3FileSystem) else ""


def _unguarded() -> None:
    """Check nothing: the folder of a reader."""


def refuse_secrets(location: str) -> None:
    """Check that a run folder's location has no credentials in it: it is kept and shown.

    Raises:
        RunFolderError: it has; the message does not repeat them.
    """
    if holds_secret(location):
        raise RunFolderError(
            "run folder: expected a URI without credentials, which would be kept with the run;"
            f" {_S3_HINT}"
        )


def opened(location: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of a path or URI, and the path in it.

    Raises:
        OSError, ValueError: the URI cannot be opened.
    """
    if "\0" in location:
        raise ValueError("expected a path or URI without NUL characters")
    if not is_uri(location):
        return fs.LocalFileSystem(), os.path.abspath(location)
    if "#" in location:
        raise ValueError("expected a URI without '#', after which names would be lost")
    twice = repeated_option(location)
    if twice is not None:
        raise ValueError(f"expected each option of a URI once, got {twice!r} more than once")
    parts = urlsplit(location)
    path = unquote(parts.path).strip("/")
    check_name(path)
    if parts.scheme == "s3":
        return _s3(parts.netloc, parts.query, s3_endpoint()), f"{parts.netloc}/{path}"
    return fs.FileSystem.from_uri(location)  # type: ignore[no-any-return]


@lru_cache
def _s3(bucket: str, query: str, endpoint: str | None) -> fs.S3FileSystem:
    """Return what pyarrow would for such a URI, but one that gives up sooner."""
    options: dict[str, Any] = {}
    if query:
        options |= parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    unknown = options.keys() - {*_S3_OPTIONS, _ANONYMOUS}
    if unknown or not bucket:
        raise ValueError(
            f"expected s3://bucket/folder with options of {', '.join(_S3_OPTIONS)};"
            f" got {', '.join(sorted(unknown)) or 'no bucket'}"
        )
    if _ANONYMOUS in options:
        if options[_ANONYMOUS] not in ("true", "false"):
            raise ValueError(f"expected anonymous=true or false, got {options[_ANONYMOUS]}")
        options[_ANONYMOUS] = options[_ANONYMOUS] == "true"
    if not _REGION.fullmatch(options.get("region", "")):
        raise ValueError(f"expected a region such as eu-central-1, got {options['region']!r}")
    if not options.get("endpoint_override"):
        # An empty one names no server, for pyarrow and for `endpoints.endpoint`.
        options.pop("endpoint_override", None)
    if endpoint and "endpoint_override" not in options:
        url = urlsplit(endpoint)
        options |= {"endpoint_override": url.netloc, "scheme": url.scheme}
    if "region" not in options and "endpoint_override" not in options:
        options["region"] = fs.resolve_s3_region(bucket)
    options["retry_strategy"] = fs.AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS)
    try:
        # A small file is sent in one request instead of three.
        return fs.S3FileSystem(allow_delayed_open=True, **options)
    except TypeError:  # an older pyarrow
        return fs.S3FileSystem(**options)


def _upload(filesystem: fs.FileSystem, target: str, content: IO[bytes]) -> None:
    with filesystem.open_output_stream(target) as stream:
        shutil.copyfileobj(content, stream, _CHUNK)


@contextmanager
def _durable(target: Path) -> Iterator[IO[bytes]]:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            with _where_supported():
                os.fsync(stream.fileno())
        with _where_supported():
            os.chmod(scratch, 0o644)
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    with _where_supported():
        _sync_folder(target.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _where_shared() -> Iterator[None]:
    """Pass over a folder that another process uses, or has removed."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT}:
            raise


@contextmanager
def _where_supported() -> Iterator[None]:
    """Pass over what network filesystems may not have: fsync of folders, permissions."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
