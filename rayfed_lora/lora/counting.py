"""Counting the values of states. Source: this project (method.md, "The ledger")."""

from __future__ import annotations

from rayfed_lora.types import AdapterState


def factor_params(state: AdapterState) -> int:
    """Return the number of values in all factors of a state.

    >>> import numpy as np
    >>> from rayfed_lora.types import Factors
    >>> q = Factors(np.zeros((2, 4), np.float32), np.zeros((6, 2), np.float32), 1.0)
    >>> factor_params(AdapterState({"q": q}, {}))
    20
    """
    return sum(f.a.size + f.b.size for f in state.factors.values())


def dense_params(state: AdapterState) -> int:
    """Return the number of values in the densely trained tensors of a state."""
    return sum(tensor.size for tensor in state.dense.values())
