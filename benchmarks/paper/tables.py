"""Print what run.py has found as the tables of ../README.md: `python tables.py`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).parent.parent / "results" / "paper"
ALPHAS = (0.5, 0.1)
# Who is compared with whom, on the same seeds.
PAIRS = (
    ("sa-adapter", "fixed-equal"),
    ("sa-adapter", "fixed-high"),
    ("sa-adapter", "fixed-low"),
    ("sa-adapter", "fedavg"),
    ("sa-full", "fedavg"),
    ("sa-full", "sa-adapter"),
    ("fixed-high", "fedavg"),
)


def spread(values: pd.Series[float]) -> str:
    """Return mean and standard deviation, in points of accuracy."""
    return f"{100 * values.mean():.2f} ({100 * values.std():.2f})"


def methods(runs: pd.DataFrame) -> str:
    """Return a table with a row a method: accuracy, bytes, reduction.

    Args:
        runs: final_accuracy, total_bytes, bytes_base and both reductions of each method and seed.
    """
    lines = [
        "| method | accuracy, % | MB sent | less than FedAvg | with the base counted |",
        "|---|---|---|---|---|",
    ]
    for method, own in runs.groupby("method", sort=False):
        lines.append(
            f"| {method} | {spread(own['final_accuracy'])}"
            f" | {own['total_bytes'].mean() / 1e6:.0f}"
            f" | {100 * own['reduction_vs_fedavg'].mean():.2f} %"
            f" | {100 * own['reduction_vs_fedavg_with_base'].mean():.2f} % |"
        )
    return "\n".join(lines)


def differences(runs: pd.DataFrame) -> str:
    """Return a table of differences of accuracy, seed by seed."""
    scores = runs.pivot_table(index="seed", columns="method", values="final_accuracy")
    lines = ["| | mean difference, points | each seed |", "|---|---|---|"]
    for one, other in PAIRS:
        if one in scores and other in scores:
            found = 100 * (scores[one] - scores[other])
            each = ", ".join(f"{value:+.2f}" for value in found)
            lines.append(f"| {one} - {other} | {found.mean():+.2f} | {each} |")
    return "\n".join(lines)


def main() -> None:
    """Print all sets, as far as they are run."""
    for name in ("trec", "vader", "fashion"):
        for part in (*map(str, ALPHAS), "rules", "choices"):
            path = RESULTS / f"{name}-{part}-runs.csv"
            if path.exists():
                runs = pd.read_csv(path)
                seeds = runs["seed"].nunique()
                print(f"**{name}, {part}**, {seeds} seeds\n\n{methods(runs)}\n")
                if part not in ("rules", "choices"):
                    print(f"{differences(runs)}\n")


if __name__ == "__main__":
    main()
