"""Files that carry their own checksum: Parquet tables and texts.

A sealed table has the SHA-256 of its bytes in the footer's key-value metadata; a sealed text has
that of all further lines in its first line, a comment. In the sum of a table the 64 digits of the
checksum count as zeros. No other file is needed to check one, so a kill between the writes of two
files leaves neither of them in doubt, and a file may be read while the run goes on.

A file without a seal is from an older version, and is taken as it is.

Source: this project.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayfed_lora.errors import RunFolderError
from rayfed_lora.locations import child
from rayfed_lora.storage import RunFolder

_KEY = "checksum"
_MARK = b"rayfed-lora sha256 "
_ZEROS = b"0" * 64
# A Parquet file ends with the length of its footer, 4 bytes, and a word of 4 bytes.
_PARQUET = b"PAR1"
_END = 8
_CHUNK = 1 << 22
_LINE = "# sha256 of what follows: "
# Written again by a resumed run; anything else has to come from a copy.
_REMADE = ("partition.parquet", "summary.json", "SHA256SUMS", "adapter/", "base/")


def is_remade(folder: RunFolder, name: str) -> bool:
    """Return whether a resumed run writes a file of the run folder again."""
    return name.startswith(_REMADE) and bool(folder.names("checkpoints"))


def damaged(folder: RunFolder, name: str, reason: str) -> RunFolderError:
    """Return the error of a file that is not as it was written: what is wrong, and what to do."""
    do = "restore it from a copy, or run anew in another folder"
    # Of a folder that is not read beyond its links, nothing better is known.
    with suppress(RunFolderError):
        if is_remade(folder, name):
            do = "a run with --resume writes it again from the last checkpoint"
        elif name.endswith(".parquet") and _is_begun(folder):
            do = "a run with --resume begins anew: it has no checkpoint yet"
    return RunFolderError(f"{child(folder.location, name)} is damaged: {reason}; {do}")


def _is_begun(folder: RunFolder) -> bool:
    """Return whether a folder holds a run that was killed before its first checkpoint."""
    ended = any(folder.exists(name) for name in ("checkpoints", "summary.json", "SHA256SUMS"))
    return folder.exists("recipe.yaml") and not ended


@contextmanager
def table_writer(sink: IO[bytes], schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Open a sealed table to be written row group by row group.

    Args:
        sink: where the bytes go, in order; stays open.
        schema: of the columns.
    """
    sealing = _Sealing(sink)
    with pq.ParquetWriter(sealing, schema) as writer:
        yield writer
        writer.add_key_value_metadata({_KEY: (_MARK + _ZEROS).decode()})
        sealing.hold()
    sealing.finish()


def write_table(folder: RunFolder, name: str, table: pa.Table) -> None:
    """Write a sealed table, whole or not at all.

    Raises:
        RunError: the folder cannot be written.
    """
    with folder.opened(name) as sink, table_writer(sink, table.schema) as writer:
        writer.write_table(table)


class _Sealing(io.RawIOBase):
    """Passes a table's bytes on; holds the footer back until the checksum can be put into it."""

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
def opened(
    folder: RunFolder, name: str, *, sha256: str | None = None, sealed: bool = False
) -> Iterator[pa.NativeFile]:
    """Open a table that is as it was written.

    The bytes that are checked are those that are read: a remote file is fetched once, and a file
    that a running run replaces meanwhile stays open.

    Args:
        folder: the run folder.
        name: of the table.
        sha256: of the whole file, where another file says so; None: the table's own seal counts.
        sealed: whether a table without a seal is damage, not a table of an older version.

    Raises:
        RunFolderError: it is missing or damaged.
    """
    with _fetched(folder, name) as file:
        try:
            reason = _fault(file, sealed) if sha256 is None else _other(file, sha256)
        except OSError as error:
            reason = str(error)
        if reason is not None:
            raise damaged(folder, name, reason)
        file.seek(0)
        yield file


def check(
    folder: RunFolder, name: str, sha256: str | None = None, *, sealed: bool = False
) -> str | None:
    """Return why a file is not as it was written, None where it is; arguments as for `opened`."""
    try:
        with opened(folder, name, sha256=sha256, sealed=sealed):
            return None
    except RunFolderError as error:
        return str(error)


def has_seal(file: pa.NativeFile) -> bool:
    """Return whether an open table carries a checksum."""
    return _place(file) is not None


@contextmanager
def _fetched(folder: RunFolder, name: str) -> Iterator[pa.NativeFile]:
    try:
        source = folder.source(name)
    except OSError as error:
        raise damaged(folder, name, f"it is missing or cannot be opened ({error})") from None
    with source:
        if folder.local is not None:
            yield source
            return
        with tempfile.NamedTemporaryFile() as copy:
            try:
                for block in _blocks(source, 0, source.size()):
                    copy.write(block)
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


def _place(file: pa.NativeFile) -> int | None:
    """Return where the digits of a table's checksum stand, None where it has none.

    Source: Apache Parquet, "File Format": footer, its length, magic number.
    """
    size: int = file.size()
    end = b"".join(_blocks(file, max(size - _END, 0), size))
    if len(end) < _END or not end.endswith(_PARQUET):
        return None
    start = max(size - _END - int.from_bytes(end[:4], "little"), 0)
    footer = b"".join(_blocks(file, start, size))
    place = footer.rfind(_MARK)
    if place < 0:
        return None
    return start + place + len(_MARK)


def _fault(file: pa.NativeFile, required: bool) -> str | None:
    place, size = _place(file), file.size()
    if place is None:
        return "it has lost its checksum" if required else None
    total = hashlib.sha256()
    for block in _blocks(file, 0, place):
        total.update(block)
    digits = b"".join(_blocks(file, place, min(place + len(_ZEROS), size)))
    total.update(_ZEROS)
    for block in _blocks(file, place + len(_ZEROS), size):
        total.update(block)
    if digits == total.hexdigest().encode():
        return None
    return "its bytes do not match the checksum in it"


def _other(file: pa.NativeFile, sha256: str) -> str | None:
    total = hashlib.sha256()
    for block in _blocks(file, 0, file.size()):
        total.update(block)
    return None if total.hexdigest() == sha256 else "its bytes do not match SHA256SUMS"


def sealed_text(text: str) -> bytes:
    """Return a text with its checksum in a first line, which is a comment.

    >>> sealed_text("a: 1").decode().splitlines()[1]
    'a: 1'
    """
    digits = hashlib.sha256(text.encode()).hexdigest()
    return f"{_LINE}{digits}\n{text}".encode()


def text(folder: RunFolder, name: str) -> str:
    """Return a text without its seal; one without a seal as it is.

    Raises:
        OSError: it is not there or cannot be read.
        RunFolderError: it is not as it was written.
    """
    content = folder.read(name)
    first, _, rest = content.partition(b"\n")
    try:
        if not first.startswith(_LINE.encode()):
            # An older version's, or one that the user has put there.
            return content.decode()
        if first != f"{_LINE}{hashlib.sha256(rest).hexdigest()}".encode():
            raise damaged(
                folder,
                name,
                "its lines do not match the checksum in the first one (if you edited the file,"
                " remove that line)",
            )
        return rest.decode()
    except UnicodeDecodeError as error:
        raise damaged(folder, name, str(error)) from None
