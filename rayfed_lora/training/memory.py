"""Memory of a training process: what glibc's allocator keeps, and shortages.

Source: this project; mallopt(3).
"""

from __future__ import annotations

import ctypes
import gc
import platform
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from rayfed_lora.errors import BlockMemoryError

# Part of the plain RuntimeError that torch raises when the host is out of memory.
_CPU_ALLOCATOR = "DefaultCPUAllocator"
# Parameters of glibc's allocator, and their values in bytes: the second is the maximum.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _MOST_MMAP_THRESHOLD = 1 << 28, 1 << 25


def keep_freed_memory() -> bool:
    """Let this process keep up to 256 MB of freed memory instead of returning it to the system.

    Each training step allocates what the last one has freed. Page faults would take 2 to 4 % of
    the step (benchmarks/README.md).

    Returns:
        Whether the setting took effect; it needs glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = mallopt(_TRIM_THRESHOLD, _KEPT_BYTES), mallopt(_MMAP_THRESHOLD, _MOST_MMAP_THRESHOLD)
    return all(kept)


def return_freed_memory() -> None:
    """Return the freed memory that this process has kept to the system."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def memory_watched(clients: Sequence[int]) -> Iterator[None]:
    """Turn a shortage of memory, of a GPU or the host, into a BlockMemoryError.

    GPU memory that torch has cached is released then.

    Raises:
        BlockMemoryError: the block of these clients does not fit into memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_shortage(error):
            raise
        # The frames of the failed step hold its tensors, whose memory a smaller block needs.
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BlockMemoryError(
            f"{len(clients)} clients ({clients[0]} to {clients[-1]}) do not fit into memory"
            f" together: {reason}"
        ) from error


def _is_shortage(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _CPU_ALLOCATOR in str(error)
