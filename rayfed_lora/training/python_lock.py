"""Who may use Python while a thread of this process computes.

torch gives Python's lock away while it works, above all in a backward pass, and takes it for each
of the many short steps of loading a block. What another thread does for the next block, or with the
last one, is best done during the former: during the latter, each waits for the other.

Source: this project (benchmarks/README.md).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Seconds: a trainer that never says that it works without the lock delays others by this at most.
_LONGEST_S = 0.02
_free = threading.Event()
_free.set()
# Threads that need it.
_needing: set[int] = set()


@contextmanager
def needed() -> Iterator[None]:
    """Tell others that this thread computes, and needs the lock until it says `rarely_needed`."""
    _needing.add(threading.get_ident())
    _free.clear()
    try:
        yield
    finally:
        rarely_needed()


def rarely_needed() -> None:
    """Tell others that this thread is mostly in torch from here on."""
    _needing.discard(threading.get_ident())
    if not _needing:
        _free.set()


def wait() -> None:
    """Wait until no thread needs the lock, but not for ever."""
    _free.wait(_LONGEST_S)
