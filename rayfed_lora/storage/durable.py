"""Local files written whole or not at all: write to a scratch file, fsync, rename.

Source: this project; POSIX rename(2), fsync(2).
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# Errors of filesystems that lack an operation, e.g. fsync of folders on a network filesystem.
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)


@contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """Open a file to be written; it has its name, durably, once the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            with ignoring(_NOT_SUPPORTED):
                os.fsync(stream.fileno())
        with ignoring(_NOT_SUPPORTED):
            os.chmod(scratch, 0o644)
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    with ignoring(_NOT_SUPPORTED):
        _sync_folder(target.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def ignoring(codes: Collection[int]) -> Iterator[None]:
    """Ignore an OSError whose errno is one of `codes`."""
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise
