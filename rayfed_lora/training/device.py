"""Choosing the torch device. Source: this project."""

from __future__ import annotations

import torch

# Share of its GPU fraction that an actor may allocate; the rest is the driver's own.
_MEMORY_SHARE = 0.95


def has_gpu() -> bool:
    """Return whether torch sees a GPU in this process."""
    return torch.cuda.is_available()


def device_of_share(gpus: float) -> str:
    """Return the device of a worker with this GPU share, and bound its share of the memory.

    A worker without GPUs sees all of them on a GPU node: it must take the CPU on purpose. A
    logical GPU without a card behind it counts as none.

    Args:
        gpus: the worker's share, in GPUs.
    """
    if gpus == 0 or not has_gpu():
        return "cpu"
    if gpus < 1:
        torch.cuda.set_per_process_memory_fraction(_MEMORY_SHARE * gpus, 0)
    return "cuda:0"


def seen_gpus() -> int:
    """Return how many GPUs torch can use in this process."""
    return torch.cuda.device_count() if has_gpu() else 0


def peak_mb() -> float:
    """Return the most GPU memory that torch has held at a time in this process, in MB (10^6)."""
    return torch.cuda.max_memory_reserved() / 1e6


def total_mb() -> float:
    """Return the memory of this process's first GPU, in MB (10^6)."""
    return torch.cuda.get_device_properties(0).total_memory / 1e6
