"""Standard output and error of the command line. Source: this project."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Droppable(io.FileIO):
    """A stream whose content is dropped once a write has failed.

    A run ends neither with the reader of its output (`| head`), nor with the disk under its log.
    """

    error: OSError | None = None

    def write(self, content: ReadableBuffer, /) -> int:
        if self.error is None:
            try:
                return super().write(content)
            except OSError as error:
                self.error = error
        return memoryview(content).nbytes


@contextmanager
def safe_output() -> Iterator[None]:
    r"""Make any text printable to stdout and stderr in the block, whatever becomes of the two.

    Characters that the encoding lacks are escaped, as `\xfc`. Text that cannot be written is
    dropped; if stdout's was lost for another reason than a reader that has gone, the block ends
    with a message and exit status 1.
    """
    with ExitStack() as stack:
        out = stack.enter_context(_replaced("stdout"))
        stack.enter_context(_replaced("stderr"))
        status: object = 0
        try:
            yield
        except SystemExit as end:
            status = end.code
            raise
        finally:
            error = None if out is None else _flushed(out)
            if error is not None and error.errno != errno.EPIPE:
                print(f"rayfed-lora: cannot write to stdout: {error.strerror}", file=sys.stderr)
                if not status:
                    sys.exit(1)


def _flushed(stream: _Droppable) -> OSError | None:
    sys.stdout.flush()
    return stream.error


@contextmanager
def _replaced(name: str) -> Iterator[_Droppable | None]:
    before = getattr(sys, name)
    try:
        raw = _Droppable(before.fileno(), "wb", closefd=False)
    except (AttributeError, OSError):  # closed, or not a file
        yield None
        return
    before.flush()
    after = io.TextIOWrapper(
        io.BufferedWriter(raw),
        before.encoding,
        "backslashreplace",
        line_buffering=before.line_buffering,
    )
    setattr(sys, name, after)
    try:
        yield raw
    finally:
        after.flush()
        setattr(sys, name, before)
