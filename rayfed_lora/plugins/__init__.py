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
    "Done": "rayfed_lora.objectives.objective",
    "LocalStep": "rayfed_lora.objectives.objective",
    "ModelStep": "rayfed_lora.objectives.objective",
    "objective": "rayfed_lora.objectives.objective",
    "rule": "rayfed_lora.aggregation.rule",
    "shape": "rayfed_lora.annealing.schedules",
    "Offer": "rayfed_lora.annealing.acceptance",
    "acceptance": "rayfed_lora.annealing.acceptance",
    "allocation": "rayfed_lora.annealing.budget",
    "sampler": "rayfed_lora.federation.sampling",
    "weight": "rayfed_lora.tasks.training",
    "model": "rayfed_lora.plugins.models",
    "metric": "rayfed_lora.federation.evaluation",
    "partition": "rayfed_lora.data.partitions",
    "data": "rayfed_lora.data.source",
    "optimizer": "rayfed_lora.plugins.optimizers",
    "update": "rayfed_lora.wire.update",
    "joined": "rayfed_lora.federation.evaluation",
    "ClientHistory": "rayfed_lora.federation.sampling",
    "FinishedRound": "rayfed_lora.runs.callbacks",
    "ClientUpdates": "rayfed_lora.aggregation.updates",
}
__all__ = [
    "ClientHistory",
    "ClientUpdates",
    "Done",
    "FinishedRound",
    "LocalStep",
    "ModelStep",
    "Offer",
    "acceptance",
    "allocation",
    "data",
    "joined",
    "metric",
    "model",
    "objective",
    "optimizer",
    "partition",
    "rule",
    "sampler",
    "shape",
    "update",
    "weight",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rayfed_lora.plugins' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
