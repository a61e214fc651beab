"""What plots of runs show: the plots, and curves over runs that differ in the seed only.

Source: this project; colours: Okabe and Ito, "Color Universal Design", 2008.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from rayfed_lora.runs.reading import RunData

# Distinguishable to colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a6d00")
Against = Literal["round", "bytes_so_far", "simulated_so_far"]
# Label of the x axis, and the divisor of the column.
_X_AXES: Mapping[Against, tuple[str, float]] = {
    "round": ("round", 1.0),
    "bytes_so_far": ("sent so far, MB (up and down)", 1e6),
    "simulated_so_far": ("simulated time, min", 60.0),
}


@dataclass(frozen=True)
class Plot:
    """A plot of one column of rounds.parquet.

    Attributes:
        title: on the report page.
        column: on the y axis.
        label: of the y axis, with its unit.
        against: the column on the x axis.
        from_zero: the y axis starts at zero.
        file: name of its file for papers, without ending; None: on the report page only.
    """

    title: str
    column: str
    label: str
    against: Against = "round"
    from_zero: bool = False
    file: str | None = None

    @property
    def x_label(self) -> str:
        """The label of the x axis, with its unit."""
        return _X_AXES[self.against][0]

    @property
    def log_x(self) -> bool:
        """Whether the x axis is logarithmic."""
        return self.against == "bytes_so_far"

    def has_points(self, rounds: pd.DataFrame) -> bool:
        """Return whether there are values to draw; `rounds` as for `curves`."""
        return bool((rounds[self.column].notna() & rounds[self.against].notna()).any())


_ACCURACY = ("eval_accuracy", "test accuracy")
PLOTS = (
    Plot("Accuracy on the test split", *_ACCURACY, file="accuracy-by-round"),
    Plot("Accuracy against traffic", *_ACCURACY, "bytes_so_far", file="accuracy-by-bytes"),
    Plot(
        "Accuracy by the simulated clock",
        *_ACCURACY,
        "simulated_so_far",
        file="accuracy-by-simulated-time",
    ),
    Plot("Loss on the test split", "eval_loss", "test loss, nats", file="loss-by-round"),
    Plot("Perplexity on the test split", "eval_perplexity", "test perplexity"),
    Plot("Training loss", "train_loss", "training loss, nats"),
    Plot("Rank", "rank", "rank, mean over modules", from_zero=True, file="rank"),
    Plot("Temperature", "temperature", "temperature, nats", from_zero=True, file="temperature"),
    Plot("Aggregation error", "aggregation_error", "relative to the exact mean", from_zero=True),
)


@dataclass(frozen=True)
class Curve:
    """A column of rounds.parquet over rounds, bytes or simulated time.

    Attributes:
        label: of the runs.
        place: index of the label among all labels, the same in every plot.
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

    @property
    def colour(self) -> str:
        """The colour of its label."""
        return COLOURS[self.place % len(COLOURS)]

    def line_style(self, styles: Sequence[str]) -> str:
        """Return one of `styles`: the next one once all colours are used."""
        return styles[self.place // len(COLOURS) % len(styles)]


def curves(rounds: pd.DataFrame, column: str, against: Against = "round") -> list[Curve]:
    """Return a curve for each label, over the rounds in which the column has values.

    `rounds` are rows of rounds.parquet of all runs, with `method` (the label), `seed`,
    `bytes_so_far` and `simulated_so_far`.
    """
    found = []
    places = {label: i for i, label in enumerate(rounds["method"].unique())}
    for label, own in rounds.dropna(subset=column).groupby("method", sort=False):
        points = own.groupby("round")
        mean = points[column].mean()
        x = mean.index.to_numpy() + 1
        if against != "round":
            x = (points[against].mean() / _X_AXES[against][1]).to_numpy()
        std, runs = points[column].std().fillna(0.0).to_numpy(), own["seed"].nunique()
        found.append(Curve(str(label), places[label], x, mean.to_numpy(), std, runs))
    return found


def measure(name: str, values: pd.Series[Any]) -> tuple[str, pd.Series[Any]]:
    """Return label and values of an axis; bytes in MB."""
    label = short(name)
    return (f"{label}, MB", values / 1e6) if "bytes" in name else (label, values)


def short(key: str) -> str:
    """Return the name of a metric or recipe key without the prefix that its section shares.

    >>> short("annealing.heating.rank"), short("annealing.temperature"), short("eval_accuracy")
    ('heating rank', 'temperature', 'test accuracy')
    """
    if key.startswith("eval_"):
        key = key.replace("eval", "test", 1)
    parts = key.split(".")[-2:]
    return " ".join(parts[parts[0] == "annealing" :]).replace("_", " ")


def accuracies_of_clients(runs: Sequence[RunData]) -> dict[str, npt.NDArray[Any]]:
    """Return the accuracies of the last models on clients' own examples, by label.

    Those of clients' own models, if any, are under the label with "(own models)".
    """
    found: dict[str, list[npt.NDArray[Any]]] = {}
    for run in runs:
        kinds = {"accuracy": run.label, "personal_accuracy": f"{run.label} (own models)"}
        for column, label in kinds.items():
            if column in run.tests and run.tests[column].notna().any():
                found.setdefault(label, []).append(run.tests[column].dropna().to_numpy())
    return {label: np.concatenate(parts) for label, parts in found.items()}
