"""Print what run.py has found as the tables of ../README.md: `python tables.py`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).parent.parent / "results" / "paper"
ALPHAS = (0.5, 0.1)
# Who is compared with whom, on the same seeds.
PAIRS = (
    ("sa-mended", "fixed-high"),
    ("sa-mended", "fixed-equal"),
    ("sa-mended", "sa-adapter"),
    ("sa-adapter", "fixed-equal"),
    ("sa-adapter", "fixed-high"),
    ("sa-adapter", "fixed-low"),
    ("sa-adapter", "fedavg"),
    ("sa-full", "fedavg"),
    ("sa-full", "sa-adapter"),
    ("fixed-high", "fedavg"),
)


def spread(values: pd.Series[float], decimals: int = 2) -> str:
    """Return the mean, and the standard deviation where there are several values."""
    mean = f"{values.mean():.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ({values.std():.{decimals}f})"


def methods(runs: pd.DataFrame) -> str:
    """Return a table with a row a method: accuracy, loss, bytes, reduction.

    Args:
        runs: final_accuracy, final_loss, total_bytes and both reductions of each method and seed.
    """
    lines = [
        "| method | accuracy, % | loss | MB sent | less than FedAvg | with the base counted |",
        "|---|---|---|---|---|---|",
    ]
    for method, own in runs.groupby("method", sort=False):
        lines.append(
            f"| {method} | {spread(100 * own['final_accuracy'])}"
            f" | {spread(own['final_loss'], 3)}"
            f" | {own['total_bytes'].mean() / 1e6:.0f}"
            f" | {100 * own['reduction_vs_fedavg'].mean():.2f} %"
            f" | {100 * own['reduction_vs_fedavg_with_base'].mean():.2f} % |"
        )
    return "\n".join(lines)


def differences(runs: pd.DataFrame) -> str:
    """Return a table of differences, seed by seed for accuracy."""
    scores = runs.pivot_table(
        index="seed", columns="method", values=["final_accuracy", "final_loss"]
    )
    accuracy, loss = scores["final_accuracy"], scores["final_loss"]
    lines = ["| | accuracy, points | each seed | loss |", "|---|---|---|---|"]
    for one, other in PAIRS:
        if one in accuracy and other in accuracy:
            found = 100 * (accuracy[one] - accuracy[other])
            each = ", ".join(f"{value:+.2f}" for value in found)
            apart = (loss[one] - loss[other]).mean()
            lines.append(f"| {one} - {other} | {found.mean():+.2f} | {each} | {apart:+.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Print all sets, as far as they are run."""
    for name in ("trec", "vader", "fashion"):
        for part in (*map(str, ALPHAS), "plain", "rules", "choices", "metropolis"):
            # The mended method is one more of those with plain choices.
            titles = [f"{name}-{part}", *([f"{name}-mended"] if part == "plain" else [])]
            paths = [RESULTS / f"{title}-runs.csv" for title in titles]
            if paths[0].exists():
                runs = pd.concat([pd.read_csv(path) for path in paths if path.exists()])
                seeds = runs["seed"].nunique()
                print(f"**{name}, {part}**, {seeds} seeds\n\n{methods(runs)}\n")
                if part not in ("choices", "metropolis"):
                    print(f"{differences(runs)}\n")


if __name__ == "__main__":
    main()
