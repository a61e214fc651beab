"""Seconds that a trial of a search takes, beside the same runs one by one.

Both in fresh processes, start-up included; turns alternate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from rayfed_lora.runs.summary import versions

RESULTS = Path(__file__).parents[1] / "results" / "search"
RECIPE = "digits-vit"
PROGRAM = "from rayfed_lora.cli.commands import main; main()"


def seconds(*arguments: str) -> float:
    """Run a command to its end; return the wall time."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", PROGRAM, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    repeats = parser.parse_args().repeats
    rows = []
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            whole = seconds("tune", "quick", "--recipe", RECIPE, "--out", str(out / "search"))
            trials = pd.read_parquet(out / "search" / "trials.parquet")
            recipes = [out / "search" / "trials" / t / "recipe.yaml" for t in trials["trial"]]
            alone = [
                seconds("run", str(recipe), "--out", str(out / str(i)))
                for i, recipe in enumerate(recipes)
            ]
        rows.append(
            {
                "repeat": repeat,
                "trials": len(recipes),
                "search_s": whole,
                "search_s_per_trial": whole / len(recipes),
                "alone_s": alone,
                "ratio": whole / sum(alone),
            }
        )
        print(rows[-1])
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {"recipe": RECIPE, "space": "quick", "versions": dict(versions()), "repeats": rows}
    (RESULTS / "trial_time.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
