"""Method presets: the keys that a method's name fills in.

Only what sets a method apart stands here; everything else is the recipe's default. Source:
method.md's tables; FedAvg arXiv:1602.05629, FedProx arXiv:1812.06127, FedIT (fedlora)
arXiv:2305.05644, SA-FedLoRA arXiv:2405.09394 v1 and v2 (SPD-CFL; target mode is a surrogate for
its SGC measure, which is not public).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _annealing(mode: str, *, trainable: str, proximal_weight: float, acceptance: str) -> Any:
    """Return the keys that every preset sets, so that any of them can replace any other."""
    return {
        "mode": mode,
        "initiating": {"trainable": trainable, "proximal_weight": proximal_weight},
        "acceptance": acceptance,
    }


_STAGED = _annealing("staged", trainable="full", proximal_weight=0.01, acceptance="always")
_TARGET = _annealing("staged", trainable="adapter", proximal_weight=0.01, acceptance="target")
_FIXED = _annealing("fixed", trainable="full", proximal_weight=0.0, acceptance="always")
_FULL = _annealing("full", trainable="full", proximal_weight=0.0, acceptance="always")
_PROXIMAL = _annealing("full", trainable="full", proximal_weight=0.01, acceptance="always")

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "sa-fedlora": {"annealing": _STAGED},
    "fedavg": {"annealing": _FULL},
    "fedprox": {"annealing": _PROXIMAL},
    "fedlora": {
        "annealing": {**_FIXED, "allocation": "uniform"},
        "aggregation": {"rule": "factor-average"},
    },
    "spd-cfl": {"annealing": _TARGET},
}


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return the deep merge of two mappings; values of `over` win.

    >>> merged({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
    {'a': {'x': 1, 'y': 3}}
    """
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            result[key] = merged(below, value)
        else:
            result[key] = value
    return result
