"""Curves of runs that differ in the seed only, for all kinds of plots. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from rayfed_lora.runs.reading import RunData

# Colours that colour-blind readers tell apart; Okabe and Ito 2008.
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#8a6d00",
)
Against = Literal["round", "bytes_so_far", "simulated_so_far"]
# What x is divided by, and what its axis says.
UNITS: Mapping[Against, tuple[float, str]] = {
    "bytes_so_far": (1e6, "sent so far, MB (up and down)"),
    "simulated_so_far": (60.0, "simulated time, min"),
}


@dataclass(frozen=True)
class Curve:
    """A column of rounds.parquet against rounds or bytes.

    Attributes:
        label: of the runs.
        place: of the label among all labels: the same in every plot.
        x: (points,) rounds from 1, or megabytes or simulated minutes so far (mean over runs).
        mean: (points,) over the runs.
        std: (points,) sample standard deviation over the runs, 0 with one.
        runs: number of runs.
    """

    label: str
    place: int
    x: npt.NDArray[Any]
    mean: npt.NDArray[Any]
    std: npt.NDArray[Any]
    runs: int


def measure(name: str, values: pd.Series[Any]) -> tuple[str, pd.Series[Any]]:
    """Return label and values of an axis, bytes in MB."""
    label = short(name)
    return (f"{label}, MB", values / 1e6) if "bytes" in name else (label, values)


def short(key: str) -> str:
    """Return the name of a metric or recipe key without what all of its section share.

    >>> short("annealing.heating.rank"), short("annealing.temperature"), short("eval_accuracy")
    ('heating rank', 'temperature', 'eval accuracy')
    """
    parts = key.split(".")[-2:]
    return " ".join(parts[parts[0] == "annealing" :]).replace("_", " ")


def has_points(rounds: pd.DataFrame, column: str, against: Against) -> bool:
    """Return whether there is anything to draw; arguments as for `curves`."""
    there = rounds[column].notna()
    if against != "round":
        there &= rounds[against].notna()
    return bool(there.any())


def curves(rounds: pd.DataFrame, column: str, against: Against = "round") -> list[Curve]:
    """Return a curve for each label, over the rounds in which the column has values.

    Args:
        rounds: rows of rounds.parquet of all runs, with `method` (the label), `seed`,
            `bytes_so_far` and `simulated_so_far`.
        column: what to draw.
        against: x.
    """
    found = []
    places = {label: i for i, label in enumerate(rounds["method"].unique())}
    for label, own in rounds.dropna(subset=column).groupby("method", sort=False):
        points = own.groupby("round")
        x = None if against == "round" else points[against].mean() / UNITS[against][0]
        mean = points[column].mean()
        found.append(
            Curve(
                label=str(label),
                place=places[label],
                x=(mean.index.to_numpy() + 1) if x is None else x.to_numpy(),
                mean=mean.to_numpy(),
                std=points[column].std().fillna(0.0).to_numpy(),
                runs=own["seed"].nunique(),
            )
        )
    return found


def accuracies_of_clients(runs: Sequence[RunData]) -> dict[str, npt.NDArray[Any]]:
    """Return the accuracies of the last models on clients' own examples, by label.

    Where clients have models of their own, also those of these, by the label with "(own models)".
    """
    found: dict[str, list[npt.NDArray[Any]]] = {}
    for run in runs:
        kinds = {"accuracy": run.label, "personal_accuracy": f"{run.label} (own models)"}
        for column, label in kinds.items():
            if column in run.tests and run.tests[column].notna().any():
                found.setdefault(label, []).append(run.tests[column].dropna().to_numpy())
    return {label: np.concatenate(parts) for label, parts in found.items()}
