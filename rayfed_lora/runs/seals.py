"""Files that contain their own checksum, Parquet tables and texts, and errors about damaged files.

A sealed table has the SHA-256 of its bytes in the footer's key-value metadata; while the checksum
is computed, its 64 digits count as zeros. A sealed text has the SHA-256 of all further lines in its
first line, a comment. A file is checked without any other file, so a run killed between two writes
leaves no file in doubt, and a file can be read while the run continues.

Older versions wrote tables without a seal: these can be read, but a run cannot resume from them.

Source: this project; Apache Parquet, "File Format".
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayfed_lora.errors import RunFolderError
from rayfed_lora.locations import child
from rayfed_lora.storage import RunFolder

_KEY = "checksum"
_MARK = b"rayfed-lora sha256 "
_ZEROS = b"0" * 64
# A Parquet file ends with its footer, the footer's length in 4 bytes, and this magic number.
_PARQUET = b"PAR1"
_TAIL = 8
_CHUNK = 1 << 22
_LINE = "# sha256 of what follows: "
# Written again by a resumed run; any other file has to be restored from a copy.
_REWRITTEN = ("partition.parquet", "summary.json", "SHA256SUMS", "adapter/", "base/")


@contextmanager
def table_writer(sink: IO[bytes], schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Open a sealed table to be written row group by row group into a sink that stays open."""
    sealing = _Sealing(sink)
    with pq.ParquetWriter(sealing, schema) as writer:
        yield writer
        writer.add_key_value_metadata({_KEY: (_MARK + _ZEROS).decode()})
        sealing.hold()
    sealing.finish()


def write_table(folder: RunFolder, name: str, table: pa.Table) -> None:
    """Write a sealed table, whole or not at all; a RunError where it cannot be written."""
    with folder.open_to_write(name) as sink, table_writer(sink, table.schema) as writer:
        writer.write_table(table)


class _Sealing(io.RawIOBase):
    """Forwards a table's bytes; holds the footer back until the checksum can be put into it."""

    def __init__(self, sink: IO[bytes]) -> None:
        self._sink = sink
        self._hash = hashlib.sha256()
        self._footer: bytearray | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        content = memoryview(data)
        if self._footer is not None:
            self._footer += content
        else:
            self._hash.update(content)
            self._sink.write(content)
        return content.nbytes

    def hold(self) -> None:
        self._footer = bytearray()

    def finish(self) -> None:
        footer = bytes(self._footer or b"")
        self._hash.update(footer)
        start = footer.rindex(_MARK + _ZEROS) + len(_MARK)
        digits = self._hash.hexdigest().encode()
        self._sink.write(footer[:start] + digits + footer[start + len(digits) :])


@contextmanager
def open_table(
    folder: RunFolder, name: str, *, sha256: str | None = None, seal_required: bool = True
) -> Iterator[pa.NativeFile]:
    """Open a table and check its bytes.

    The checked bytes are the ones that are read: a remote file is fetched once, and a local file
    stays open although a running run may replace it.

    Args:
        folder: the run folder.
        name: of the table, or of any file where `sha256` is given.
        sha256: of the whole file, as listed elsewhere; None: the table's own seal is checked.
        seal_required: a table without a seal is damaged; False: it is returned unchecked.

    Raises:
        RunFolderError: it is missing or damaged.
    """
    with _fetched(folder, name) as file:
        try:
            if sha256 is None:
                _check_seal(file, seal_required)
            elif file_sha256(file) != sha256:
                raise OSError("its bytes do not match SHA256SUMS")
        except OSError as error:
            raise damaged(folder, name, str(error)) from None
        file.seek(0)
        yield file


def check(folder: RunFolder, name: str, sha256: str | None = None) -> str | None:
    """Return why a file is damaged, None where it is not; arguments as for `open_table`."""
    try:
        with open_table(folder, name, sha256=sha256):
            return None
    except RunFolderError as error:
        return str(error)


def file_sha256(file: pa.NativeFile) -> str:
    """Return the checksum of an open file, in hexadecimal."""
    return _sha256(_blocks(file, 0, file.size()))


def has_seal(file: pa.NativeFile) -> bool:
    """Return whether an open table contains a checksum."""
    return _digits_at(file) is not None


@contextmanager
def _fetched(folder: RunFolder, name: str) -> Iterator[pa.NativeFile]:
    try:
        source = folder.open_to_read(name)
    except OSError as error:
        raise damaged(folder, name, f"it is missing or cannot be opened ({error})") from None
    with source:
        if folder.local is not None:
            yield source
            return
        with tempfile.NamedTemporaryFile() as copy:
            try:
                copy.writelines(_blocks(source, 0, source.size()))
            except OSError as error:
                raise damaged(folder, name, f"it cannot be read ({error})") from None
            copy.flush()
            with pa.OSFile(copy.name) as file:
                yield file


def _blocks(file: pa.NativeFile, start: int, end: int) -> Iterator[bytes]:
    while start < end:
        block = file.read_at(min(_CHUNK, end - start), start)
        if not block:
            raise OSError(f"it ends at byte {start} of {end}")
        yield block
        start += len(block)


def _sha256(blocks: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for block in blocks:
        total.update(block)
    return total.hexdigest()


def _digits_at(file: pa.NativeFile) -> int | None:
    """Return the position of a table's checksum, None where it has none."""
    size: int = file.size()
    tail = b"".join(_blocks(file, max(size - _TAIL, 0), size))
    if len(tail) < _TAIL or not tail.endswith(_PARQUET):
        return None
    start = max(size - _TAIL - int.from_bytes(tail[:4], "little"), 0)
    mark = b"".join(_blocks(file, start, size)).rfind(_MARK)
    return None if mark < 0 else start + mark + len(_MARK)


def _check_seal(file: pa.NativeFile, required: bool) -> None:
    """Raise an OSError where a table does not match its seal, or lacks one that is required."""
    start = _digits_at(file)
    if start is None:
        if required:
            raise OSError("it has lost its checksum")
        return
    end, size = start + len(_ZEROS), file.size()
    digits = b"".join(_blocks(file, start, min(end, size)))
    content = chain(_blocks(file, 0, start), [_ZEROS], _blocks(file, end, size))
    if digits != _sha256(content).encode():
        raise OSError("its bytes do not match the checksum in it")


def sealed_text(text: str) -> bytes:
    """Return a text with its checksum in a first line, which is a comment.

    >>> sealed_text("a: 1").decode().splitlines()[1]
    'a: 1'
    """
    digits = hashlib.sha256(text.encode()).hexdigest()
    return f"{_LINE}{digits}\n{text}".encode()


def text(folder: RunFolder, name: str) -> str:
    """Return a text without its seal; a text without a seal is returned unchecked.

    Raises OSError where it cannot be read, RunFolderError where it is damaged.
    """
    content = folder.read(name)
    first, _, rest = content.partition(b"\n")
    try:
        if not first.startswith(_LINE.encode()):
            # Written by the user.
            return content.decode()
        if first != f"{_LINE}{hashlib.sha256(rest).hexdigest()}".encode():
            reason = "its lines do not match the checksum in the first one"
            raise damaged(folder, name, f"{reason} (if you edited the file, remove that line)")
        return rest.decode()
    except UnicodeDecodeError as error:
        raise damaged(folder, name, str(error)) from None


def is_rewritten(folder: RunFolder, name: str) -> bool:
    """Return whether a resumed run writes a file of the run folder again."""
    return name.startswith(_REWRITTEN) and bool(folder.names("checkpoints"))


def damaged(folder: RunFolder, name: str, reason: str) -> RunFolderError:
    """Return an error that names a damaged or missing file, the reason, and what to do."""
    advice = "restore it from a copy, or run anew in another folder"
    # Where a confined folder is not readable, this advice is all that is known.
    with suppress(RunFolderError):
        if is_rewritten(folder, name):
            advice = "a run with --resume writes it again from the last checkpoint"
        elif name.endswith(".parquet") and _has_no_checkpoint(folder):
            advice = "a run with --resume begins anew: it has no checkpoint yet"
    return RunFolderError(f"{child(folder.location, name)} is damaged: {reason}; {advice}")


def _has_no_checkpoint(folder: RunFolder) -> bool:
    """Return whether a folder holds a run that ended before its first checkpoint."""
    later = ("checkpoints", "summary.json", "SHA256SUMS")
    return folder.exists("recipe.yaml") and not any(folder.exists(name) for name in later)
