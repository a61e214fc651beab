"""Own methods: decorators that register them, by kind.

    from rayfed_lora.plugins import rule

    @rule()
    def plain_mean(start, updates):
        return updates.mean()

A decorator is imported from its home when it is first used; see docs/own-methods.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "rule": "rayfed_lora.aggregation.rule",
    "shape": "rayfed_lora.annealing.schedules",
    "update": "rayfed_lora.wire.update",
    "ClientUpdates": "rayfed_lora.aggregation.updates",
}
__all__ = ["ClientUpdates", "rule", "shape", "update"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rayfed_lora.plugins' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
