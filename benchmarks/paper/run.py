"""The paper's claim put to the test: SA-FedLoRA beside FedAvg and federated-LoRA methods.

`python run.py [--out DIR] [--stages tune,main,plain,rules,choices] [--sets trec,vader,fashion]`
runs, in this order and one run after another:

* tune: each method's learning rate, by a climb on a grid that is the same for all, seed 100,
  alpha 0.5;
* main: SA-FedLoRA (full and adapter-only initiating stage), FedAvg and fixed ranks (high, low, and
  the one that sends as much as the annealed ranks do), every set, alpha 0.1 and 0.5, three seeds
  that tuning has not seen; FedProx too on TREC, alpha 0.5;
* plain: the same on TREC, alpha 0.5, with the choices that were made before anything was known;
* rules: the other methods on TREC, alpha 0.5;
* choices: SA-FedLoRA's own options on TREC, alpha 0.5, seeds for tuning only.

Finished runs are not run again: end it at any time (SIGINT), start it again. Tables of what there
is go to results/paper/.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

import rayfed_lora
from rayfed_lora.presets import PRESETS
from rayfed_lora.reporting.terminal import watching_comparison

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "paper"
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# Where the climb starts; the grid is the same for all.
START, START_FULL = 3e-3, 3e-4
TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2)
LR, FIRST_LR = "clients.optimizer.lr", "annealing.initiating.lr"
RANK, LOW_RANK = "annealing.heating.rank", "annealing.cooling.rank"
Variant = Mapping[str, Any]
# What was found to be better on a tuning seed, for fixed and annealed ranks alike.
WIDE: Variant = {"adapter.target_modules": "all-linear", RANK: 16, LOW_RANK: 4}
LORA: Variant = {**WIDE, "aggregation.rule": "product-svd"}
# And for annealed ranks: a cut leaves the learning rate and the update as they are.
ANNEALED: Variant = {
    **LORA,
    "method": "sa-fedlora",
    "adapter.scaling": "alpha_over_rank",
    "annealing.cooling.residual": "fold",
}
ADAPTER_ONLY: Variant = {"annealing.initiating.trainable": "adapter"}
MAIN: Mapping[str, Variant] = {
    "fedavg": {"method": "fedavg"},
    "fixed-high": {**LORA, "method": "fedlora"},
    # The annealed ranks sum to 206 over 20 rounds; what their cuts fold is another 16.
    "fixed-equal": {**LORA, "method": "fedlora", RANK: 11},
    "fixed-low": {**LORA, "method": "fedlora", RANK: 4},
    "sa-adapter": {**ANNEALED, **ADAPTER_ONLY},
    "sa-full": ANNEALED,
}
# Only their rank differs, and the scale is alpha / rank.
LR_OF: Mapping[str, str] = {"fixed-equal": "fixed-high", "fixed-low": "fixed-high"}
# The same comparison before anything was looked for: query and value projections, alpha 16, rank
# 8 to 2 and 5 at equal bytes, plain averaging, a constant scale, cuts dropped.
PLAIN: Mapping[str, Variant] = {
    "fixed-high": {"method": "fedlora"},
    "fixed-equal": {"method": "fedlora", RANK: 5},
    "fixed-low": {"method": "fedlora", RANK: 2},
    "sa-adapter": {"method": "sa-fedlora", "adapter.scaling": "constant", **ADAPTER_ONLY},
    "sa-full": {"method": "sa-fedlora", "adapter.scaling": "constant"},
}
# On one set and skew only, as the other methods: it costs as much as all fixed ranks together.
FIRST, FIRST_ALPHA = "trec", 0.5
ONCE: Mapping[str, Variant] = {"fedprox": {"method": "fedprox"}}
# The methods that set an aggregation rule.
RULES: Mapping[str, Variant] = {
    name: {**WIDE, "method": name} for name, keys in PRESETS.items() if "aggregation" in keys
}
_SHAPES = ("linear", "cubic", "exponential", "logarithmic", "step")
CHOICES: Mapping[str, Variant] = {
    "none": {},
    "constant": {"adapter.scaling": "constant"},
    "drop": {"annealing.cooling.residual": "drop"},
    "constant-drop": {"adapter.scaling": "constant", "annealing.cooling.residual": "drop"},
    "factor-average": {"aggregation.rule": "factor-average"},
    "query-value": {"adapter.target_modules": "auto"},
    **{f"shape-{shape}": {"annealing.cooling.shape": shape} for shape in _SHAPES},
    "metropolis": {"annealing.acceptance": "metropolis", "annealing.cooling.residual": "drop"},
    "spectral": {"annealing.allocation": "spectral"},
    "long-heating": {"annealing.heating.rounds": 11, "annealing.holding.rounds": 0},
}


def compare(name: str, out: Path, variants: Mapping[str, Variant], seeds: Any, **settings: Any):
    """Run what is left of some variants on a set; return the comparison."""
    with watching_comparison(Console()) as watch:
        return rayfed_lora.compare(
            str(HERE / f"{name}.yaml"), variants, str(out), seeds, settings=settings, watch=watch
        )


def tuned(
    name: str, out: Path, variants: Mapping[str, Variant], known: Mapping[str, Variant]
) -> dict[str, Variant]:
    """Return the variants with the best learning rate found on the grid for each.

    A climb on the grid, which ends where both neighbours are no better.
    SA-FedLoRA's full first round takes the rate that is the best for FedAvg.

    Args:
        name: of the set.
        out: folder of the runs.
        variants: to tune.
        known: tuned ones that these may take a rate from.
    """
    scores: dict[str, dict[float, float]] = {method: {} for method in variants}
    found: dict[str, Variant] = {}
    while len(found) < len(variants):
        trials: dict[str, tuple[str, float]] = {}
        grid: dict[str, Variant] = {}
        for method, own in variants.items():
            others = {**known, **found}
            needed = "fedavg" if method == "sa-full" else LR_OF.get(method)
            if needed is not None and needed not in others:
                continue
            first = {FIRST_LR: others["fedavg"][LR]} if method == "sa-full" else {}
            full = method in ("fedavg", "fedprox")
            lr = next_rate(scores[method], START_FULL if full else START)
            if method in LR_OF:
                found[method] = {**own, LR: others[LR_OF[method]][LR]}
            elif lr is None:
                best = max(scores[method], key=scores[method].__getitem__)
                found[method] = {**own, **first, LR: best}
            else:
                trials[f"{method}-{lr:g}"] = method, lr
                grid[f"{method}-{lr:g}"] = {**own, **first, LR: lr}
        if grid:
            runs = compare(name, out, grid, TUNING_SEEDS[:1]).runs
            for label, accuracy in zip(runs["method"], runs["final_accuracy"], strict=True):
                method, lr = trials[label]
                scores[method][lr] = accuracy
    rows = [
        {"method": method, "lr": lr, "accuracy": accuracy}
        for method, tried in scores.items()
        for lr, accuracy in sorted(tried.items())
    ]
    save(pd.DataFrame(rows), f"{name}-{out.name}")
    return found


def next_rate(scores: Mapping[float, float], start: float) -> float | None:
    """Return the next rate to try; None where the best has no untried neighbour."""
    if not scores:
        return start
    i = GRID.index(max(scores, key=scores.__getitem__))
    near = [GRID[j] for j in (i - 1, i + 1) if 0 <= j < len(GRID)]
    return next((lr for lr in near if lr not in scores), None)


def save(table: pd.DataFrame, name: str) -> None:
    """Write a table of the results."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    table.drop(columns=["location", "ranks"], errors="ignore").to_csv(
        RESULTS / f"{name}.csv", index=False, float_format="%.6g"
    )


def finish(
    name: str, out: Path, title: str, variants: Mapping[str, Variant], seeds: Any, **own: Any
) -> None:
    """Run what is left of some variants on a set; write tables and plots of the comparison."""
    found = compare(name, out, variants, seeds, **own)
    save(found.runs, f"{title}-runs")
    save(found.methods, f"{title}-methods")
    save(found.rounds, f"{title}-rounds")
    for plot in ("accuracy-by-bytes", "accuracy-by-round", "rank"):
        shutil.copy(out / "plots" / f"{plot}.png", RESULTS / f"{title}-{plot}.png")


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(HERE / "runs"))
    parser.add_argument("--stages", default="tune,main,plain,rules,choices")
    parser.add_argument("--sets", default="trec,vader,fashion")
    args = parser.parse_args()
    stages, sets, out = args.stages.split(","), args.sets.split(","), Path(args.out)
    best = {
        name: tuned(name, out / name / "tuning", {**MAIN, **(ONCE if name == FIRST else {})}, {})
        for name in sets
    }
    if "main" in stages:
        for alpha in (FIRST_ALPHA, 0.1):
            for name in sets:
                partition = {"data.partition.alpha": alpha}
                whole = (name, alpha) == (FIRST, FIRST_ALPHA)
                variants = {m: own for m, own in best[name].items() if whole or m not in ONCE}
                folder = out / name / f"main-{alpha}"
                finish(name, folder, f"{name}-{alpha}", variants, SEEDS, **partition)
    for stage, methods in (("plain", PLAIN), ("rules", RULES)):
        if FIRST in sets and stage in stages:
            known = {"fedavg": best[FIRST]["fedavg"]}
            variants = tuned(FIRST, out / FIRST / f"tuning-{stage}", methods, known)
            finish(FIRST, out / FIRST / stage, f"{FIRST}-{stage}", variants, SEEDS)
    if FIRST in sets and "choices" in stages:
        variants = {name: {**best[FIRST]["sa-adapter"], **own} for name, own in CHOICES.items()}
        finish(FIRST, out / FIRST / "choices", f"{FIRST}-choices", variants, TUNING_SEEDS)
    (RESULTS / "chosen.json").write_text(json.dumps(best, indent=1) + "\n")


if __name__ == "__main__":
    main()
