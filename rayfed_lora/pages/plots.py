"""Plots of comparisons and searches for papers: PDF and PNG by matplotlib. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt
import pandas as pd

from rayfed_lora.pages.curves import COLOURS, PLOTS, Plot, curves, measure
from rayfed_lora.storage import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMATS = ("pdf", "png")
_LINES = ("-", "--", ":", "-.")
_DOTS_PER_INCH = 200


def write_plots(
    folder: RunFolder, rounds: pd.DataFrame, clients: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Draw a comparison into the folder's `plots/`, but for plots without values.

    `rounds` as for `curves`; `clients` are the accuracies on clients' own examples, by method, all
    seeds together.
    """
    for plot in PLOTS:
        if plot.file is not None and plot.has_points(rounds):
            _write(folder, plot.file, drawn(plot, rounds))
    if clients:
        _write(folder, "clients", _spread(clients))


def write_front(folder: RunFolder, trials: pd.DataFrame, upper: str, across: str) -> None:
    """Draw finished trials and their Pareto front, objective `upper` over objective `across`.

    `trials` are rows of trials.parquet.
    """
    figure, axes = _axes(layout="constrained")
    done = trials[trials["status"] == "finished"].sort_values(across)
    (x_label, x), (y_label, y) = (measure(name, done[name]) for name in (across, upper))
    front = done["on_front"]
    axes.scatter(x, y, color=COLOURS[5], s=16, label="finished trials")
    axes.plot(x[front], y[front], color=COLOURS[0], marker="o", ms=4, label="Pareto front")
    if "bytes" in across:
        _log_scale(axes)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.legend(frameon=False, fontsize=8)
    _write(folder, "front", figure)


def _write(folder: RunFolder, stem: str, figure: Figure) -> None:
    """Write a plot in all formats."""
    for kind in _FORMATS:
        content = BytesIO()
        # Without the date, equal runs give equal files.
        dated = {"CreationDate": None} if kind == "pdf" else None
        figure.savefig(content, format=kind, dpi=_DOTS_PER_INCH, metadata=dated)
        folder.write(f"plots/{stem}.{kind}", content.getvalue())


def _axes(height: float = 4.0, layout: Literal["constrained"] | None = None) -> tuple[Figure, Axes]:
    # Matplotlib's object interface needs neither global state nor a window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout=layout)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def drawn(plot: Plot, rounds: pd.DataFrame) -> Figure:
    """Return a plot as a matplotlib figure; `rounds` as for `curves`."""
    figure, axes = _axes()
    # Fixed margins: a layout for each plot would take as long as drawing the plot twice.
    figure.subplots_adjust(left=0.13, right=0.97, bottom=0.14, top=0.97)
    found = curves(rounds, plot.column, plot.against)
    for curve in found:
        line, colour = curve.line_style(_LINES), curve.colour
        axes.plot(curve.x, curve.mean, line, color=colour, marker="o", ms=2.5, label=curve.label)
        if curve.runs > 1:
            low, high = curve.mean - curve.std, curve.mean + curve.std
            axes.fill_between(curve.x, low, high, color=colour, alpha=0.15, lw=0)
    if plot.log_x:
        _log_scale(axes)
    axes.set(xlabel=plot.x_label, ylabel=plot.label)
    if plot.from_zero:
        axes.set_ylim(bottom=0)
    many = max(curve.runs for curve in found) > 1
    title = "mean and standard deviation over seeds" if many else None
    axes.legend(frameon=False, fontsize=8, title=title, title_fontsize=7)
    return figure


def _log_scale(axes: Axes) -> None:
    """Make x logarithmic, with ticks at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _spread(clients: Mapping[str, npt.NDArray[Any]]) -> Figure:
    """Return one box per method: quartiles, whiskers at the 10th and 90th percentile."""
    figure, axes = _axes(1.0 + 0.5 * len(clients), "constrained")
    axes.boxplot(list(clients.values()), orientation="horizontal", whis=(10, 90), showmeans=True)
    axes.set_yticks(range(1, len(clients) + 1), list(clients))
    axes.invert_yaxis()
    axes.set(xlabel="accuracy on each client's own examples (whiskers: 10 % and 90 %)")
    return figure
