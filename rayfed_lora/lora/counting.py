"""Numbers of values in states.

Source: this project (docs/method.md, "The communication ledger").
"""

from __future__ import annotations

from rayfed_lora.types import AdapterState, Frozen


def factor_params(state: AdapterState, frozen: Frozen | None = None) -> int:
    """Return the number of values in all factors of a state, the frozen ones left out.

    >>> import numpy as np
    >>> from rayfed_lora.types import Factors
    >>> q = Factors(np.zeros((2, 4), np.float32), np.zeros((6, 2), np.float32), 1.0)
    >>> factor_params(AdapterState({"q": q}, {}))
    20
    """
    sizes = {"a": 0, "b": 0}
    for f in state.factors.values():
        sizes["a"] += f.a.size
        sizes["b"] += f.b.size
    return sum(size for kind, size in sizes.items() if kind != frozen)


def dense_params(state: AdapterState) -> int:
    """Return the number of values in the densely trained tensors of a state."""
    return sum(tensor.size for tensor in state.dense.values())
