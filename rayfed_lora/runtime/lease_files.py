"""Numbered lease files of a folder: `.owner-1.json`, `.owner-2.json`, ...; the highest one counts.

A file is created by exactly one of several processes that try at once: by O_EXCL on a mounted
filesystem, by conditional writes on S3, by best effort elsewhere. What fails raises OSError.

Source: this project; POSIX open(2); Amazon S3 User Guide, "Conditional requests".
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from pyarrow import fs

from rayfed_lora.errors import RayfedError
from rayfed_lora.storage import RunFolder

_NAME = re.compile(r"\.owner-(\d+)\.json")
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
    return S3Files(*folder.place)


def _name(number: int) -> str:
    return f".owner-{number}.json"


def _numbers(names: list[str]) -> list[int]:
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
            return _numbers(os.listdir(self._folder))
        except FileNotFoundError:
            return []

    def read(self, number: int) -> bytes | None:
        """Return a file's content, None where it is gone."""
        try:
            return self._path(number).read_bytes()
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise

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
        try:
            handle = os.open(self._path(number), os.O_RDWR)
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise
        try:
            if os.read(handle, len(old) + 1) != old:
                return False
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, new)
        finally:
            os.close(handle)
        return True

    def remove(self, number: int) -> None:
        """Remove a file if it is there."""
        self._path(number).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove the folders that `create` made and that are empty."""
        with suppress(OSError):
            for path in self._made:
                path.rmdir()

    def _path(self, number: int) -> Path:
        return self._folder / _name(number)


class NoConditionalWritesError(OSError):
    """The object store refuses conditions."""


class S3Files:
    """On S3: conditional writes, If-None-Match to create and If-Match to rewrite and remove."""

    remote = True
    note: str | None = None

    def __init__(self, filesystem: fs.S3FileSystem, path: str) -> None:
        """Make a client with the endpoint, region and credentials of the filesystem."""
        self._bucket, _, folder = path.partition("/")
        self._prefix = f"{folder}/" if folder else ""
        self._client = s3_client(filesystem)
        self._tags: dict[int, str] = {}

    def numbers(self) -> list[int]:
        """Return the numbers of all files, ascending."""
        with _as_os_errors():
            prefix = f"{self._prefix}.owner-"
            answer = self._client.list_objects_v2(Bucket=self._bucket, Prefix=prefix)
        keys = [entry["Key"] for entry in answer.get("Contents", ())]
        return _numbers([key.rpartition("/")[2] for key in keys])

    def read(self, number: int) -> bytes | None:
        """Return a file's content, None where it is gone."""
        content: bytes | None = None

        def ask() -> None:
            nonlocal content
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(number))
            content, self._tags[number] = answer["Body"].read(), answer["ETag"]

        self._held(ask)
        return content

    def create(self, number: int, content: bytes) -> bool:
        """Create a file; return False, and change nothing, where it is there.

        Raises:
            NoConditionalWritesError: the store refuses conditions.
        """
        # A request that was repeated for want of an answer finds its own file.
        return self._put(number, content, IfNoneMatch="*") or self.read(number) == content

    def rewrite(self, number: int, old: bytes, new: bytes) -> bool:
        """Replace `old` by `new`; False where the file is gone or differs."""
        if number not in self._tags and self.read(number) != old:
            return False
        return self._put(number, new, IfMatch=self._tags[number])

    def remove(self, number: int) -> None:
        """Remove a file as this object read or wrote it last."""
        where = {"Bucket": self._bucket, "Key": self._key(number)}
        condition = {"IfMatch": self._tags.pop(number)} if number in self._tags else {}
        try:
            self._held(lambda: self._client.delete_object(**where, **condition))
        except NoConditionalWritesError:
            # Some stores know conditions of writes only.
            self._held(lambda: self._client.delete_object(**where))

    def tidy(self) -> None:
        """Do nothing: an object store has no folders."""

    def _put(self, number: int, content: bytes, **condition: str) -> bool:
        def ask() -> None:
            answer = self._client.put_object(
                Bucket=self._bucket, Key=self._key(number), Body=content, **condition
            )
            self._tags[number] = answer["ETag"]

        return self._held(ask)

    def _held(self, ask: Callable[[], object]) -> bool:
        """Make a request; return False where its condition does not hold."""
        from botocore.exceptions import ClientError

        with _as_os_errors():
            try:
                ask()
            except ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                code = error.response.get("Error", {}).get("Code")
                if code == "NotImplemented" or status == 501:
                    raise NoConditionalWritesError(str(error)) from error
                # 409: another conditional write of the same object was under way.
                if code == "NoSuchBucket" or status not in (404, 409, 412):
                    raise
                return False
            return True

    def _key(self, number: int) -> str:
        return self._prefix + _name(number)


def s3_client(filesystem: fs.S3FileSystem) -> Any:
    """Return boto3's client of the same store, with the same credentials, as pyarrow's filesystem.

    The options come from what the filesystem is pickled as, its only complete description. Keys
    that it does not name come from boto3's default chain, which is that of pyarrow's SDK.
    """
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    options = filesystem.__reduce__()[1][0]
    endpoint, anonymous = options["endpoint_override"], options["anonymous"]
    config = Config(
        connect_timeout=5,
        read_timeout=10,
        retries={"total_max_attempts": 3, "mode": "standard"},
        s3={"addressing_style": "path" if endpoint else "auto"},
        # Stores other than Amazon's may not know the newer checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        **({"signature_version": UNSIGNED} if anonymous else {}),
    )
    return boto3.session.Session().client(
        "s3",
        region_name=options["region"] or None,
        endpoint_url=f"{options['scheme']}://{endpoint}" if endpoint else None,
        aws_access_key_id=options["access_key"] or None,
        aws_secret_access_key=options["secret_key"] or None,
        aws_session_token=options["session_token"] or None,
        verify=options.get("tls_ca_file_path") or None,
        config=config,
    )


@contextmanager
def _as_os_errors() -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise OSError(str(error)) from error


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
            return _numbers(self._folder.names())

    def read(self, number: int) -> bytes | None:
        """Return a file's content, None where it is gone."""
        try:
            return self._folder.read(_name(number))
        except FileNotFoundError:
            return None

    def create(self, number: int, content: bytes) -> bool:
        """Create a file and see whether it stays; return False where another one is there."""
        with _read_errors():
            if self._folder.exists(_name(number)):
                return False
            self._made = self._made or not self._folder.exists("")
            self._folder.write(_name(number), content)
        time.sleep(self._settle_s)
        return self.read(number) == content

    def rewrite(self, number: int, old: bytes, new: bytes) -> bool:
        """Replace `old` by `new`; False where the file is gone or differs."""
        if self.read(number) != old:
            return False
        with _read_errors():
            self._folder.write(_name(number), new)
        return True

    def remove(self, number: int) -> None:
        """Remove a file if it is there."""
        with _read_errors():
            self._folder.remove(_name(number))

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
