"""The torch device of a process, and its memory. Source: this project."""

from __future__ import annotations

import torch

# Part of its GPU share that an actor may allocate; the GPU driver needs the rest.
_MEMORY_SHARE = 0.95


def has_gpu() -> bool:
    """Return whether torch sees a GPU in this process."""
    return torch.cuda.is_available()


def device_of_share(gpus: float) -> str:
    """Return the torch device of a worker with this GPU share, and limit its GPU memory.

    On a GPU node, a worker without a GPU share sees all GPUs and must still use the CPU. A logical
    GPU without hardware counts as none.

    Args:
        gpus: the worker's share, in GPUs.
    """
    if gpus == 0 or not has_gpu():
        return "cpu"
    if gpus < 1:
        torch.cuda.set_per_process_memory_fraction(_MEMORY_SHARE * gpus, 0)
    return "cuda:0"


def seen_gpus() -> int:
    """Return the number of GPUs that torch can use in this process."""
    return torch.cuda.device_count() if has_gpu() else 0


def peak_mb() -> float:
    """Return the peak of the GPU memory reserved by torch in this process, in MB (10^6)."""
    return torch.cuda.max_memory_reserved() / 1e6


def total_mb() -> float:
    """Return the memory of this process's first GPU, in MB (10^6)."""
    return torch.cuda.get_device_properties(0).total_memory / 1e6
