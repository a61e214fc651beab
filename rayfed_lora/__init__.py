"""Federated LoRA fine-tuning simulated on Ray, with annealed parameter budgets (SA-FedLoRA).

Importing this package imports neither Ray nor torch nor transformers; its functions do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayfed_lora.diagnosis.doctor import doctor as doctor
    from rayfed_lora.jobs.jobs import Jobs as Jobs
    from rayfed_lora.launching.compare import compare as compare
    from rayfed_lora.launching.launch import run as run
    from rayfed_lora.launching.planning import plan as plan
    from rayfed_lora.launching.result import Result as Result
    from rayfed_lora.pages.comparison_tables import Comparison as Comparison
    from rayfed_lora.pages.report import report as report
    from rayfed_lora.recipe.loading import load_recipe as load_recipe
    from rayfed_lora.recipe.recipe import Recipe as Recipe
    from rayfed_lora.tuning.search_result import SearchResult as SearchResult
    from rayfed_lora.tuning.tune import tune as tune

__version__ = "0.1.0"

_HOMES = {
    "Comparison": "rayfed_lora.pages.comparison_tables",
    "Jobs": "rayfed_lora.jobs.jobs",
    "Recipe": "rayfed_lora.recipe.recipe",
    "Result": "rayfed_lora.launching.result",
    "SearchResult": "rayfed_lora.tuning.search_result",
    "compare": "rayfed_lora.launching.compare",
    "doctor": "rayfed_lora.diagnosis.doctor",
    "load_recipe": "rayfed_lora.recipe.loading",
    "plan": "rayfed_lora.launching.planning",
    "report": "rayfed_lora.pages.report",
    "run": "rayfed_lora.launching.launch",
    "tune": "rayfed_lora.tuning.tune",
}
__all__ = [
    "Comparison",
    "Jobs",
    "Recipe",
    "Result",
    "SearchResult",
    "__version__",
    "compare",
    "doctor",
    "load_recipe",
    "plan",
    "report",
    "run",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rayfed_lora' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
