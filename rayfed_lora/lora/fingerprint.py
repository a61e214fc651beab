"""A checksum of a trained state, equal only for equal bits. Source: this project."""

from __future__ import annotations

import hashlib

import numpy as np

from rayfed_lora.types import AdapterState, Base


def sha256(state: AdapterState, base: Base | None = None) -> str:
    """Return the SHA-256 over all names, shapes, scales and values, sorted by name.

    Args:
        state: the trained state.
        base: its merged updates are part of the checksum.

    >>> len(sha256(AdapterState({}, {"head": np.zeros(3, np.float32)})))
    64
    """
    digest = hashlib.sha256()
    tensors = {f"dense|{name}": (tensor, 1.0) for name, tensor in state.dense.items()}
    for name, f in state.factors.items():
        tensors[f"factors|{name}|a"] = (f.a, f.scale)
        tensors[f"factors|{name}|b"] = (f.b, f.scale)
    for name, tensor in (base.merged if base is not None else {}).items():
        tensors[f"merged|{name}"] = (tensor, 1.0)
    for name, (tensor, scale) in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.shape}|{float(scale).hex()}|".encode())
        digest.update(np.ascontiguousarray(tensor, dtype="<f4").tobytes())
    return digest.hexdigest()
