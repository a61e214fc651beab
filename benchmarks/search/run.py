"""The schedule of SA-FedLoRA searched on TREC, and what was found put to the test.

`python run.py [--out DIR] [--stages search,seeds]`:

* search: `heating_cooling` on the recipe of the paper's TREC runs, seed 0; goes on if stopped;
* seeds: the recipe's own schedule, the best trial that sends no more than it, and the best one with
  as many full-model rounds, on three seeds that the search has not seen.

Tables go to results/search/.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd

import rayfed_lora
from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.cli.many_runs_display import watching_comparison, watching_search

HERE = Path(__file__).parent
RECIPE = HERE.parent / "paper" / "trec.yaml"
RESULTS = HERE.parent / "results" / "search"
SPACE, SAMPLES, SEEDS = "heating_cooling", 40, (1, 2, 3)
# FedAvg's best rate in the paper's tuning, for the rounds that train the full model.
SETTINGS = {"annealing.initiating.lr": 3e-4}


def search(out: Path) -> None:
    """Search, or go on with it."""
    with watching_search(PlainConsole()) as watch:
        rayfed_lora.tune(
            SPACE,
            RECIPE,
            str(out),
            samples=SAMPLES,
            settings=SETTINGS,
            resume=out.exists(),
            watch=watch,
        )


def chosen(trials: pd.DataFrame, budget: int) -> dict[str, pd.Series[Any]]:
    """Return the trials to be tested.

    Args:
        trials: finished ones.
        budget: bytes that the recipe's own schedule sends.
    """
    ordered = trials.sort_values(["eval_accuracy", "total_bytes"], ascending=[False, True])
    one_full_round = ordered["annealing.initiating.rounds"] == 1
    return {
        "equal-bytes": ordered[ordered["total_bytes"] <= budget].iloc[0],
        "one-full-round": ordered[one_full_round].iloc[0],
    }


def seeds(out: Path) -> None:
    """Run the chosen schedules on other seeds."""
    trials = pd.read_parquet(out / "trials.parquet")
    keys = [name for name in trials if name.startswith("annealing.")]
    recipe = rayfed_lora.load_recipe(RECIPE, SETTINGS)
    budget = rayfed_lora.plan(recipe).totals.communication()["total_bytes"]
    found = chosen(trials[trials["status"] == "finished"], budget)
    variants: dict[str, Any] = {"default": SETTINGS}
    for name, row in found.items():
        drawn = {key: row[key] for key in keys if pd.notna(row[key])}
        variants[name] = {
            **SETTINGS,
            # Rounds and ranks come back from tables with missing values as floats.
            **{k: int(v) if k.endswith(("rounds", "rank")) else v for k, v in drawn.items()},
        }
    with watching_comparison(PlainConsole()) as watch:
        result = rayfed_lora.compare(str(RECIPE), variants, f"{out}-seeds", SEEDS, watch=watch)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, table in (
        ("trials", trials.drop(columns="location")),
        ("runs", result.runs.drop(columns="location")),
        ("methods", result.methods),
    ):
        table.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.6g")
    (RESULTS / "chosen.json").write_text(json.dumps(variants, indent=1) + "\n")
    print(result.methods.T.to_string())


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(HERE / "runs" / "trec"))
    parser.add_argument("--stages", default="search,seeds")
    args = parser.parse_args()
    if "search" in args.stages:
        search(Path(args.out))
    if "seeds" in args.stages:
        seeds(Path(args.out))


if __name__ == "__main__":
    main()
