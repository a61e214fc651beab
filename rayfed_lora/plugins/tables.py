"""The tables of all kinds of methods whose names recipes choose from.

A table's built-in methods are registered by its homes. Source: this project.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rayfed_lora.plugins.registry import Table

# (start, end, u) -> value; the last round is at `end`.
SHAPES: Table[Callable[..., float]] = Table("shape", "rayfed_lora.annealing.schedules")
# An `Acceptance`; see `annealing.acceptance.acceptance`.
ACCEPTANCES: Table[Any] = Table("acceptance", "rayfed_lora.annealing.acceptance")
# An `Allocation`; see `annealing.budget.allocation`.
ALLOCATIONS: Table[Any] = Table("allocation", "rayfed_lora.annealing.budget")
RULES: Table[Any] = Table("rule", "rayfed_lora.aggregation.rules")
# (pool, wanted, history, rng) -> client ids; see `federation.sampling.sampler`.
SAMPLERS: Table[Callable[..., Any]] = Table("sampler", "rayfed_lora.federation.sampling")
# (report) -> weight; see `tasks.training.weight`.
WEIGHTS: Table[Callable[..., float]] = Table("weight", "rayfed_lora.tasks.training")
# (predictions) -> value; see `federation.evaluation.metric`.
METRICS: Table[Any] = Table("metric", "rayfed_lora.federation.evaluation")
# (parameters, lr) -> a torch optimiser.
OPTIMIZERS: Table[Callable[..., Any]] = Table("optimizer", "rayfed_lora.plugins.optimizers")
# A `Builder`; see `plugins.models.model`; none is built in.
MODELS: Table[Any] = Table("model")
OBJECTIVES: Table[Any] = Table("objective", "rayfed_lora.objectives.objectives")
UPDATES: Table[Any] = Table("update", "rayfed_lora.wire.updates")
# A `Source`; see `data.source.data`.
DATA: Table[Any] = Table("data", "rayfed_lora.data.source")
# (labels, clients, rng) -> client of each example; see `data.partitions.partition`.
PARTITIONS: Table[Callable[..., Any]] = Table("partition", "rayfed_lora.data.partitions")
