"""summary.json. Source: this project (docs/design.md, "The run folder")."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np
import pyarrow as pa

from rayfed_lora.federation.bills import Totals
from rayfed_lora.federation.evaluation import BUILT_IN
from rayfed_lora.federation.privacy import Accountant
from rayfed_lora.federation.run import Timing
from rayfed_lora.federation.selection import EARLY_STOPPING, Selection
from rayfed_lora.recipe.recipe import Recipe

_PACKAGES = ("rayfed-lora", "ray", "torch", "peft", "transformers", "numpy", "pyarrow")
# What the global model is tested for, in rounds.parquet; missing where it is not measured.
TESTED = tuple(f"eval_{metric}" for metric in BUILT_IN)
# Parts of the data's fingerprint that do not depend on clients.
_ROWS = ("training examples", "validation examples", "test examples", "names of classes")
_METRICS = ("round", *TESTED, "train_loss")


def summary(
    recipe: Recipe,
    rounds: pa.Table,
    totals: Totals,
    timing: Timing,
    adapter_sha256: str,
    clients: int,
) -> dict[str, Any]:
    """Return the summary of a finished run: JSON values.

    `final` is the last round, `best` the tested round of highest accuracy. `rounds` are the rows of
    rounds.parquet, `timing` covers all processes of the run, `clients` is the number of all.
    """
    tested = [row for row in rounds.to_pylist() if row["eval_accuracy"] is not None]
    best = max(tested, key=lambda row: row["eval_accuracy"])
    training = timing.training_s
    own = [f"eval_{metric}" for metric in recipe.evaluation.columns]
    shown = (*_METRICS, *own)
    return {
        "name": recipe.name,
        "method": recipe.method,
        "seed": recipe.seed,
        "rounds": rounds.num_rows,
        "final": {key: tested[-1][key] for key in shown},
        "best": {key: best[key] for key in shown},
        "failed_clients": sum(rounds["failed_clients"].to_pylist()),
        "retried_blocks": sum(rounds["retried_blocks"].to_pylist()),
        "communication": totals.communication(),
        "simulation": _simulation(recipe, rounds, best["round"]),
        **_privacy(recipe, rounds, clients),
        "timing": {
            "startup_s": timing.startup_s,
            "training_s": training,
            "evaluation_s": timing.evaluation_s,
            "wall_s": timing.wall_s,
            "client_updates_per_s": timing.client_updates / training if training else None,
        },
        "adapter_sha256": adapter_sha256,
        "versions": versions(),
    }


def data_summary(fingerprint: Mapping[str, str]) -> dict[str, str]:
    """Return `data_sha256`, of a run's examples as the model gets them, in all splits.

    Dealing them to clients does not change it. Nothing is returned without a fingerprint.
    """
    if not fingerprint:
        return {}
    content = json.dumps([fingerprint.get(part) for part in _ROWS])
    return {"data_sha256": hashlib.sha256(content.encode()).hexdigest()}


def selection_summary(recipe: Recipe, rounds: pa.Table, selection: Selection) -> dict[str, Any]:
    """Return which model is exported where it is not the last one, and what ended the run.

    `rounds` are the rows of rounds.parquet; the keys are absent where they do not apply:

    * `kept`: metric and value by which the best model was chosen, and the scores of its round;
    * `stopped_by`: early stopping or a callback's name, where rounds of the schedule are left;
    * `early_stopping`: its metric, the round that it ended the run with, the best value, and the
      number of tests since then.
    """
    settings, found = recipe.evaluation, dict[str, Any]()
    if selection.kept is not None:
        row = rounds.slice(selection.kept.round, 1).to_pylist()[0]
        own = [f"eval_{metric}" for metric in settings.columns]
        chosen = {"by": settings.keep_best, "value": selection.kept.value}
        found["kept"] = chosen | {key: row[key] for key in (*_METRICS, *own)}
    left = recipe.annealing.total_rounds - rounds.num_rows
    if selection.stopped_by is None or left == 0:
        return found
    found["stopped_by"] = selection.stopped_by
    if selection.stopped_by == EARLY_STOPPING and settings.early_stopping is not None:
        found["early_stopping"] = {
            "metric": settings.early_stopping.metric,
            "round": rounds.num_rows - 1,
            "best": selection.best,
            "tests": selection.waited,
        }
    return found


def _privacy(recipe: Recipe, rounds: pa.Table, clients: int) -> dict[str, Any]:
    """Return `privacy`, where the recipe asks for it."""
    if recipe.privacy is None:
        return {}
    found = {
        **recipe.privacy.model_dump(),
        "epsilon": rounds["epsilon"][-1].as_py(),
        "meaning": Accountant(recipe, clients).statement,
    }
    return {"privacy": found}


def _simulation(recipe: Recipe, rounds: pa.Table, best: int) -> dict[str, Any] | None:
    """Return totals of the simulated clock; None where no time is simulated."""
    if not recipe.simulates_time:
        return None
    seconds = rounds["simulated_s"].to_numpy()
    return {
        "total_s": float(seconds.sum()),
        "to_best_s": float(seconds[: best + 1].sum()),
        "dropped_clients": sum(rounds["dropped_clients"].to_pylist()),
    }


def client_summary(tests: pa.Table) -> dict[str, Any]:
    """Return how a model's accuracy is spread over clients, each counted once.

    Args:
        tests: rows of client_metrics.parquet of one round, at least one.

    Returns:
        Number of clients; mean, standard deviation, minimum, and mean over the worst tenth (at
        least one client), of the global model and, as `personal_...`, of the clients' own models.
    """
    found: dict[str, Any] = {"tested": tests.num_rows}
    for name in ("accuracy", "personal_accuracy"):
        values = np.sort(tests[name].drop_null().to_numpy())
        if len(values) > 0:
            worst = values[: max(len(values) // 10, 1)]
            found |= {
                f"{name}_mean": float(values.mean()),
                f"{name}_std": float(values.std()),
                f"{name}_min": float(values[0]),
                f"{name}_worst_tenth": float(worst.mean()),
            }
    return found


def versions() -> Mapping[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
