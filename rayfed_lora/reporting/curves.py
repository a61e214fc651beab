"""Curves of runs that differ in the seed only, for all kinds of plots. Source: this project."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt
import pandas as pd

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
Against = Literal["round", "bytes_so_far"]


@dataclass(frozen=True)
class Curve:
    """A column of rounds.parquet against rounds or bytes.

    Attributes:
        label: of the runs.
        place: of the label among all labels: the same in every plot.
        x: (points,) rounds from 1, or megabytes sent so far (mean over runs).
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


def curves(rounds: pd.DataFrame, column: str, against: Against = "round") -> list[Curve]:
    """Return a curve for each label, over the rounds in which the column has values.

    Args:
        rounds: rows of rounds.parquet of all runs, with `method` (the label), `seed` and
            `bytes_so_far`.
        column: what to draw.
        against: x.
    """
    found = []
    places = {label: i for i, label in enumerate(rounds["method"].unique())}
    for label, own in rounds.dropna(subset=column).groupby("method", sort=False):
        points = own.groupby("round")
        x = points["bytes_so_far"].mean() / 1e6 if against == "bytes_so_far" else None
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
