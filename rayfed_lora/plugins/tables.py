"""The tables of all kinds of methods whose names recipes choose from.

A table's built-in methods are registered by its homes. Source: this project.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rayfed_lora.plugins.registry import Table

# (start, end, u) -> value; the last round is at `end`.
SHAPES: Table[Callable[..., float]] = Table("shape", "rayfed_lora.annealing.schedules")
RULES: Table[Any] = Table("rule", "rayfed_lora.aggregation.rules")
UPDATES: Table[Any] = Table("update", "rayfed_lora.wire.updates")
