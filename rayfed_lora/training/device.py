"""The torch device of a training process; its memory, and glibc's. Source: mallopt(3)."""

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
# Part of its GPU share that an actor may allocate; the GPU driver needs the rest.
_MEMORY_SHARE = 0.95


def seen_gpus() -> int:
    """Return the number of GPUs that torch can use in this process."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_of_share(gpus: float) -> str:
    """Return the torch device of a worker with a share of `gpus` GPUs, and limit its GPU memory.

    On a GPU node, a worker without a GPU share sees all GPUs and must still use the CPU. A logical
    GPU without hardware counts as none.
    """
    if gpus == 0 or seen_gpus() == 0:
        return "cpu"
    if gpus < 1:
        torch.cuda.set_per_process_memory_fraction(_MEMORY_SHARE * gpus, 0)
    return "cuda:0"


def peak_mb() -> float:
    """Return the peak of the GPU memory reserved by torch in this process, in MB (10^6)."""
    return torch.cuda.max_memory_reserved() / 1e6


def total_mb() -> float:
    """Return the memory of this process's first GPU, in MB (10^6)."""
    return torch.cuda.get_device_properties(0).total_memory / 1e6


def keep_freed_memory() -> bool:
    """Let this process keep up to 256 MB of freed memory instead of returning it to the system.

    Each training step allocates what the last one has freed. Page faults would take 2 to 4 % of
    the step (benchmarks/README.md). Returns whether it took effect; it needs glibc.
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


def too_many(clients: Sequence[int]) -> str:
    """Return that clients do not fit into memory together."""
    few = f"{len(clients)} clients ({clients[0]} to {clients[-1]})"
    return f"{few} do not fit into memory together"


@contextmanager
def memory_watched(subject: str) -> Iterator[None]:
    """Turn a shortage of memory, of a GPU or the host, into a BlockMemoryError.

    GPU memory that torch has cached is released then. Its message begins with `subject`, which
    says what does not fit.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and _CPU_ALLOCATOR not in str(error):
            raise
        # The frames of the failed step hold its tensors, whose memory a smaller block needs.
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BlockMemoryError(f"{subject}: {reason}") from error
