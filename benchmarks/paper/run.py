"""The paper's claim put to the test: SA-FedLoRA beside FedAvg and federated-LoRA methods.

`python run.py [--out DIR] [--stages main,plain,mended,rules,choices,metropolis]
[--sets trec,vader,fashion] [--alphas 0.5,0.1]` runs, in this order and one run after another:

* main: SA-FedLoRA (full and adapter-only initiating stage), FedAvg and fixed ranks (high, low, and
  the one that sends as much as the annealed ranks do), every set, alpha 0.5 and 0.1, three seeds
  that tuning has not seen; FedProx too on TREC, alpha 0.5;
* plain: the same on TREC, alpha 0.5, with the choices that were made before anything was known;
* mended: those, with a scale and cuts that leave learning rate and update as they are;
* rules: the other methods on TREC, alpha 0.5;
* choices: SA-FedLoRA's own options on TREC, alpha 0.5, seeds for tuning only;
* metropolis: with it and without, likewise.

Each method's learning rate is tuned first, by a climb on a grid that is the same for all, on seed
100 and the same skew; what is found stands in results/paper/rates.json and is not looked for again.
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

import rayfed_lora
from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.cli.many_runs_display import watching_comparison

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "paper"
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# Where the climb starts, with adapters of either skew and without; the grid is the same for all.
START, START_SKEWED, START_FULL = 3e-3, 1e-3, 3e-4
TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2)
ALPHAS = (0.5, 0.1)
# At the higher skew: half of the clients in each round (all of VADER's, with more steps in all),
# and factors that learn four times as fast at the same rate. Else no adapter learns (../README.md).
SKEWED: Mapping[str, Mapping[str, Any]] = {
    "trec": {"clients.per_round": 10, "clients.local_steps": 5, "adapter.alpha": 64},
    "vader": {"clients.per_round": 20, "clients.local_steps": 4, "adapter.alpha": 64},
    "fashion": {"clients.per_round": 25, "clients.local_steps": 6, "adapter.alpha": 64},
}
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
Rates = Mapping[str, float]
# The same comparison before anything was looked for: query and value projections, alpha 16, rank
# 8 to 2 and 5 at equal bytes, plain averaging, a constant scale, cuts dropped.
PLAIN: Mapping[str, Variant] = {
    "fixed-high": {"method": "fedlora"},
    "fixed-equal": {"method": "fedlora", RANK: 5},
    "fixed-low": {"method": "fedlora", RANK: 2},
    "sa-adapter": {"method": "sa-fedlora", "adapter.scaling": "constant", **ADAPTER_ONLY},
    "sa-full": {"method": "sa-fedlora", "adapter.scaling": "constant"},
}
# Annealed ranks of those, with what a cut leaves as it is.
MENDED: Mapping[str, Variant] = {
    "sa-mended": {
        "method": "sa-fedlora",
        "adapter.scaling": "alpha_over_rank",
        "annealing.cooling.residual": "fold",
        **ADAPTER_ONLY,
    },
}
# On one set and skew only, as the other methods: it costs as much as all fixed ranks together.
FIRST = "trec"
ONCE: Mapping[str, Variant] = {"fedprox": {"method": "fedprox"}}
# FlexLoRA is fixed-high.
RULES: Mapping[str, Variant] = {
    name: {**WIDE, "method": name}
    for name in ("ffa-lora", "flora", "hetlora", "fedex-lora", "rolora", "lora-fair")
}
_SHAPES = ("linear", "cubic", "exponential", "logarithmic", "step")
CHOICES: Mapping[str, Variant] = {
    "none": {},
    **{f"shape-{shape}": {"annealing.cooling.shape": shape} for shape in _SHAPES},
    "spectral": {"annealing.allocation": "spectral"},
    # At the rate of FFA-LoRA.
    "freeze-a": {"aggregation.rule": "freeze-a", LR: 1e-2},
}
# By themselves: all of a comparison hold out the examples that one of it needs for validation, and
# with a tenth less 3e-3 is too much on one of the seeds.
_DROP: Variant = {"annealing.cooling.residual": "drop", LR: 1e-3}
METROPOLIS: Mapping[str, Variant] = {
    "drop": _DROP,
    "metropolis": {**_DROP, "annealing.acceptance": "metropolis"},
}


def compare(name: str, out: Path, variants: Mapping[str, Variant], seeds: Any, **settings: Any):
    """Run what is left of some variants on a set; return the comparison."""
    with watching_comparison(PlainConsole()) as watch:
        return rayfed_lora.compare(
            str(HERE / f"{name}.yaml"), variants, str(out), seeds, settings=settings, watch=watch
        )


def rates_of(
    title: str, name: str, out: Path, methods: Mapping[str, Variant], given: Rates, **settings: Any
) -> Rates:
    """Return the best learning rate on the grid of each method; tune those not known yet.

    A climb on the grid, which ends where both neighbours are no better.

    Args:
        title: what the rates are kept under.
        name: of the set.
        out: folder of the runs.
        methods: to tune.
        given: rates of methods that are tuned elsewhere.
        settings: keys of all runs.
    """
    path = RESULTS / "rates.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    rates: dict[str, float] = {**given, **kept.get(title, {})}
    scores: dict[str, dict[float, float]] = {
        method: {} for method in methods if method not in rates and method not in LR_OF
    }
    # SA-FedLoRA's full first round takes the rate that is the best for FedAvg.
    waiting = {"sa-full"} if "fedavg" in scores else set()
    while scores.keys() - rates.keys():
        trials: dict[str, tuple[str, float]] = {}
        for method in scores.keys() - rates.keys() - waiting:
            start = START_SKEWED if "adapter.alpha" in settings else START
            start = START_FULL if method in ("fedavg", "fedprox") else start
            lr = next_rate(scores[method], start)
            if lr is None:
                rates[method] = max(scores[method], key=scores[method].__getitem__)
            else:
                trials[f"{method}-{lr:g}"] = method, lr
        waiting -= {"sa-full"} if "fedavg" in rates else set()
        grid = {
            label: with_rates({method: methods[method]}, {**rates, method: lr})[method]
            for label, (method, lr) in sorted(trials.items())
        }
        if grid:
            runs = compare(name, out, grid, TUNING_SEEDS[:1], **settings).runs
            for label, accuracy in zip(runs["method"], runs["final_accuracy"], strict=True):
                method, lr = trials[label]
                scores[method][lr] = accuracy
    if scores:
        rows = [
            {"method": method, "lr": lr, "accuracy": accuracy}
            for method, tried in scores.items()
            for lr, accuracy in sorted(tried.items())
        ]
        save(pd.DataFrame(rows), f"{title}-tuning")
        found = {method: rates[method] for method in methods if method in rates}
        path.write_text(json.dumps({**kept, title: found}, indent=1, sort_keys=True) + "\n")
    return rates


def with_rates(methods: Mapping[str, Variant], rates: Rates) -> dict[str, Variant]:
    """Return methods with their learning rates."""
    first = {FIRST_LR: rates["fedavg"]} if "sa-full" in methods else {}
    return {
        method: {
            **own,
            **(first if method == "sa-full" else {}),
            LR: rates[LR_OF.get(method, method)],
        }
        for method, own in methods.items()
    }


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
    parser.add_argument("--stages", default="main,plain,mended,rules,choices,metropolis")
    parser.add_argument("--sets", default="trec,vader,fashion")
    parser.add_argument("--alphas", default="0.5,0.1", help="of the main stage")
    args = parser.parse_args()
    stages, sets, out = args.stages.split(","), args.sets.split(","), Path(args.out)

    def rates(name: str, part: str, methods: Mapping[str, Variant], given: Rates, **own: Any):
        return rates_of(
            f"{name}-{part}", name, out / name / f"tuning-{part}", methods, given, **own
        )

    for alpha in map(float, args.alphas.split(",") if "main" in stages else ()):
        for name in sets:
            own = {"data.partition.alpha": alpha, **(SKEWED[name] if alpha < ALPHAS[0] else {})}
            once = ONCE if (name, alpha) == (FIRST, ALPHAS[0]) else {}
            methods = {**MAIN, **once}
            found = with_rates(methods, rates(name, str(alpha), methods, {}, **own))
            finish(name, out / name / f"main-{alpha}", f"{name}-{alpha}", found, SEEDS, **own)
    if FIRST not in sets or set(stages) <= {"main"}:
        return
    best = rates(FIRST, str(ALPHAS[0]), {**MAIN, **ONCE}, {})
    for stage, methods in (("plain", PLAIN), ("mended", MENDED), ("rules", RULES)):
        if stage in stages:
            found = with_rates(methods, rates(FIRST, stage, methods, {"fedavg": best["fedavg"]}))
            finish(FIRST, out / FIRST / stage, f"{FIRST}-{stage}", found, SEEDS)
    annealed = with_rates(MAIN, best)["sa-adapter"]
    for stage, options in (("choices", CHOICES), ("metropolis", METROPOLIS)):
        if stage in stages:
            found = {name: {**annealed, **own} for name, own in options.items()}
            for seeds in (TUNING_SEEDS[:1], TUNING_SEEDS):
                finish(FIRST, out / FIRST / stage, f"{FIRST}-{stage}", found, seeds)


if __name__ == "__main__":
    main()
