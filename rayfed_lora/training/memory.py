"""The memory that training takes and gives back. Source: this project."""

from __future__ import annotations

import ctypes
import gc
import platform
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from rayfed_lora.errors import BlockMemoryError

# torch raises a plain RuntimeError when the CPU's allocator finds none.
_CPU_ALLOCATOR = "DefaultCPUAllocator"
# mallopt(3): parameters of glibc's allocator, and the most that it takes for the second.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _MOST_MMAP_THRESHOLD = 1 << 28, 1 << 25


def keep_freed_memory() -> bool:
    """Let this process keep up to 256 MB that it frees, instead of handing them to the system.

    A training step frees at its end what the next one needs again; fetching it from the system,
    page by page, takes 2 to 4 % of the step (benchmarks/README.md).

    Returns:
        Whether it does: not with another C library than glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = mallopt(_TRIM_THRESHOLD, _KEPT_BYTES), mallopt(_MMAP_THRESHOLD, _MOST_MMAP_THRESHOLD)
    return all(kept)


def return_freed_memory() -> None:
    """Hand to the system what this process has kept of what it freed: other work needs the room."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def memory_watched(clients: Sequence[int]) -> Iterator[None]:
    """Turn a shortage of memory, of a GPU or the host, into a BlockMemoryError.

    What torch keeps of a GPU's memory for later is given back.

    Args:
        clients: of the block, for the message.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_shortage(error):
            raise
        # What the failed step has made lives in its frames: the next, smaller one needs the room.
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BlockMemoryError(
            f"{len(clients)} clients ({clients[0]} to {clients[-1]}) do not fit into memory"
            f" together: {said}"
        ) from error


def _is_shortage(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _CPU_ALLOCATOR in str(error)
