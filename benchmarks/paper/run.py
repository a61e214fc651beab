"""The paper's claim put to the test: SA-FedLoRA beside FedAvg and federated-LoRA methods.

`python run.py [--out DIR] [--stages tune,main,rules,choices] [--sets trec,vader,fashion]` runs, in
this order and one run after another:

* tune: each method's learning rate, by a climb on a grid that is the same for all, seed 100,
  alpha 0.5;
* main: SA-FedLoRA (full and adapter-only initiating stage), FedAvg and fixed ranks (high, low, and
  the one that sends as much as the annealed ranks do), every set, alpha 0.1 and 0.5, three seeds
  that tuning has not seen; FedProx too on TREC, alpha 0.5;
* rules: the other methods on TREC, alpha 0.5;
* choices: SA-FedLoRA's own options on TREC, alpha 0.5.

Finished runs are not run again: end it at any time (SIGINT), start it again. Tables of what there
is go to results/paper/.
"""

from __future__ import annotations

import argparse
import json
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
TUNING_SEED, SEEDS = 100, (0, 1, 2)
LR, FIRST_LR = "clients.optimizer.lr", "annealing.initiating.lr"
RANK = "annealing.heating.rank"
Variant = Mapping[str, Any]
# The annealed ranks sum to 103 over 20 rounds with an adapter-only start.
EQUAL_BYTES_RANK = 5
MAIN: Mapping[str, Variant] = {
    "fedavg": {"method": "fedavg"},
    "fixed-high": {"method": "fedlora"},
    "fixed-equal": {"method": "fedlora", RANK: EQUAL_BYTES_RANK},
    "fixed-low": {"method": "fedlora", RANK: 2},
    "sa-adapter": {"method": "sa-fedlora", "annealing.initiating.trainable": "adapter"},
    "sa-full": {"method": "sa-fedlora"},
}
# On one set and skew only, as the other methods: it costs as much as all fixed ranks together.
FIRST, FIRST_ALPHA = "trec", 0.5
ONCE: Mapping[str, Variant] = {"fedprox": {"method": "fedprox"}}
# The methods that set an aggregation rule, but for plain averaging.
RULES: Mapping[str, Variant] = {
    name: {"method": name}
    for name, keys in PRESETS.items()
    if keys.get("aggregation", {}).get("rule", "factor-average") != "factor-average"
}
_SHAPES = ("linear", "cubic", "exponential", "logarithmic", "step")
CHOICES: Mapping[str, Variant] = {
    **{f"shape-{shape}": {"annealing.cooling.shape": shape} for shape in _SHAPES},
    "metropolis": {"annealing.acceptance": "metropolis"},
    "spectral": {"annealing.allocation": "spectral"},
    "fold": {"annealing.cooling.residual": "fold"},
    "product-svd": {"aggregation.rule": "product-svd"},
    "rslora": {"adapter.scaling": "rslora"},
    "long-heating": {"annealing.heating.rounds": 11, "annealing.holding.rounds": 0},
    "late-full": {"annealing.initiating.rounds": 3, "annealing.heating.rounds": 4},
}


def compare(name: str, out: Path, variants: Mapping[str, Variant], seeds: Any, **settings: Any):
    """Run what is left of some variants on a set; return the comparison."""
    with watching_comparison(Console()) as watch:
        return rayfed_lora.compare(
            str(HERE / f"{name}.yaml"), variants, str(out), seeds, settings=settings, watch=watch
        )


def tuned(name: str, out: Path, variants: Mapping[str, Variant]) -> dict[str, Variant]:
    """Return the variants with the best learning rate found on the grid for each.

    A climb on the grid, which ends where both neighbours are no better.
    SA-FedLoRA's full first round takes the rate that is the best for FedAvg.
    """
    scores: dict[str, dict[float, float]] = {method: {} for method in variants}
    found: dict[str, Variant] = {}
    while len(found) < len(variants):
        trials: dict[str, tuple[str, float]] = {}
        grid: dict[str, Variant] = {}
        for method, own in variants.items():
            full = method in ("fedavg", "fedprox")
            lr = next_rate(scores[method], START_FULL if full else START)
            first = {}
            if method == "sa-full":
                if "fedavg" not in found:
                    continue
                first = {FIRST_LR: found["fedavg"][LR]}
            if lr is None:
                best = max(scores[method], key=scores[method].__getitem__)
                found[method] = {**own, **first, LR: best}
            else:
                trials[f"{method}-{lr:g}"] = method, lr
                grid[f"{method}-{lr:g}"] = {**own, **first, LR: lr}
        if grid:
            runs = compare(name, out, grid, [TUNING_SEED]).runs
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


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(HERE / "runs"))
    parser.add_argument("--stages", default="tune,main,rules,choices")
    parser.add_argument("--sets", default="trec,vader,fashion")
    args = parser.parse_args()
    stages, sets, out = args.stages.split(","), args.sets.split(","), Path(args.out)
    best = {
        name: tuned(name, out / name / "tuning", {**MAIN, **(ONCE if name == FIRST else {})})
        for name in sets
    }
    if "main" in stages:
        for alpha in (FIRST_ALPHA, 0.1):
            for name in sets:
                partition = {"data.partition.alpha": alpha}
                left_out = set() if (name, alpha) == (FIRST, FIRST_ALPHA) else set(ONCE)
                variants = {m: own for m, own in best[name].items() if m not in left_out}
                found = compare(name, out / name / f"main-{alpha}", variants, SEEDS, **partition)
                save(found.runs, f"{name}-{alpha}-runs")
                save(found.methods, f"{name}-{alpha}-methods")
                save(found.rounds, f"{name}-{alpha}-rounds")
    if FIRST in sets and "rules" in stages:
        variants = tuned(FIRST, out / FIRST / "tuning-rules", RULES)
        found = compare(FIRST, out / FIRST / "main-rules", variants, SEEDS)
        save(found.runs, f"{FIRST}-rules-runs")
        save(found.methods, f"{FIRST}-rules-methods")
    if FIRST in sets and "choices" in stages:
        variants = {name: {**best[FIRST]["sa-full"], **own} for name, own in CHOICES.items()}
        found = compare(FIRST, out / FIRST / "choices", variants, SEEDS)
        save(found.runs, f"{FIRST}-choices-runs")
        save(found.methods, f"{FIRST}-choices-methods")
    (RESULTS / "chosen.json").write_text(json.dumps(best, indent=1) + "\n")


if __name__ == "__main__":
    main()
