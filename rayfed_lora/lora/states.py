"""Numbers of values in states, and a checksum of a state.

Source: this project (docs/method.md, "The communication ledger").
"""

from __future__ import annotations

import hashlib

import numpy as np

from rayfed_lora.types import AdapterState, Base, Frozen


def factor_params(state: AdapterState, frozen: Frozen | None = None) -> int:
    """Return the number of values in all factors of a state, the frozen ones left out.

    >>> from rayfed_lora.types import Factors
    >>> q = Factors(np.zeros((2, 4), np.float32), np.zeros((6, 2), np.float32), 1.0)
    >>> factor_params(AdapterState({"q": q}, {}))
    20
    """
    factors = state.factors.values()
    a = 0 if frozen == "a" else sum(f.a.size for f in factors)
    b = 0 if frozen == "b" else sum(f.b.size for f in factors)
    return a + b


def dense_params(state: AdapterState) -> int:
    """Return the number of values in the densely trained tensors of a state."""
    return sum(tensor.size for tensor in state.dense.values())


def sha256(state: AdapterState, base: Base | None = None) -> str:
    """Return the SHA-256 over all names, shapes, scales and values, sorted by name.

    Equal only for equal bits. The merged updates of `base` are part of it.

    >>> len(sha256(AdapterState({}, {"head": np.zeros(3, np.float32)})))
    64
    """
    tensors = {f"dense|{name}": (tensor, 1.0) for name, tensor in state.dense.items()}
    for name, f in state.factors.items():
        tensors[f"factors|{name}|a"] = (f.a, f.scale)
        tensors[f"factors|{name}|b"] = (f.b, f.scale)
    if base is not None:
        tensors |= {f"merged|{name}": (tensor, 1.0) for name, tensor in base.merged.items()}
    digest = hashlib.sha256()
    for name, (tensor, scale) in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.shape}|{float(scale).hex()}|".encode())
        digest.update(np.ascontiguousarray(tensor, dtype="<f4").tobytes())
    return digest.hexdigest()
