"""The one table of objectives; each built-in one's own file names its paper."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from rayfed_lora.objectives import built_in
from rayfed_lora.objectives.objective import Objective
from rayfed_lora.plugins import tables
from rayfed_lora.plugins.registry import Table

for _module in iter_modules(built_in.__path__):
    import_module(f"{built_in.__name__}.{_module.name}")

OBJECTIVES: Table[Objective] = tables.OBJECTIVES
