"""Interactive plots of runs, in plotly.js's format. Source: this project.

Plain mappings, since plotly's own classes take seconds to validate each figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from rayfed_lora.pages.curves import COLOURS, PLOTS, Plot, curves
from rayfed_lora.printable import client_label
from rayfed_lora.runs.client_rows import CLIENT_NAME
from rayfed_lora.runs.reading import RunData

Figure = dict[str, Any]
# A logarithmic axis of bytes, with ticks at 1, 2 and 5 of each decade.
LOG_BYTES = {"type": "log", "tickformat": "~g", "dtick": "D2"}
_AXIS = {"showline": True, "ticks": "outside", "gridcolor": "#eef1f4", "zeroline": False}
_SHADES = {
    "initiating": "#dfe7f0",
    "heating": "#fbe3cf",
    "cooling": "#d3e6f6",
    "holding": "#e6efdf",
}
_LINES = ("solid", "dash", "dot", "dashdot")
_MOST_PARTITIONS = 6
_MOST_POINTS = 5000


def figures(runs: Sequence[RunData]) -> Iterator[tuple[str, Figure]]:
    """Yield title and figure of every plot for which the runs have values."""
    rounds = pd.concat(
        [run.rounds.assign(method=run.label, seed=run.seed) for run in runs], ignore_index=True
    )
    yield from curve_figures(rounds, stages=len(runs) == 1)
    tested = [run for run in runs if not run.tests.empty]
    if tested:
        yield "Accuracy on clients' own examples", _spread(tested)


def curve_figures(rounds: pd.DataFrame, stages: bool) -> Iterator[tuple[str, Figure]]:
    """Yield title and figure of every plot of rounds that has values.

    `rounds` as for `curves`; `stages` shades the stages of a single run.
    """
    for plot in PLOTS:
        if plot.has_points(rounds):
            yield plot.title, _curves(plot, rounds, stages)


def partitions(runs: Sequence[RunData]) -> Iterator[tuple[str, Figure]]:
    """Yield label and heatmap (labels x clients) of every different partition of the runs."""
    seen: list[pd.DataFrame] = []
    for run in runs:
        if run.partition.empty or any(run.partition.equals(other) for other in seen):
            continue
        if len(seen) == _MOST_PARTITIONS:
            return
        seen.append(run.partition)
        yield f"{run.label}, seed {run.seed}", _partition(run.partition)


def framed(
    traces: list[dict[str, Any]], height: int, x: dict[str, Any], y: dict[str, Any], **layout: Any
) -> Figure:
    """Return a figure of some traces with the axes, margins and legend of all plots."""
    return {
        "data": traces,
        "layout": {
            "height": height,
            "margin": {"l": 60, "r": 20, "t": 30, "b": 50},
            "legend": {"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0},
            "xaxis": {**_AXIS, **x},
            "yaxis": {**_AXIS, **y},
            "showlegend": False,
            **layout,
        },
    }


def _curves(plot: Plot, rounds: pd.DataFrame, stages: bool) -> Figure:
    traces: list[dict[str, Any]] = []
    for curve in curves(rounds, plot.column, plot.against):
        if curve.runs > 1:
            low, high = curve.mean - curve.std, curve.mean + curve.std
            edge = {"x": [*curve.x, *curve.x[::-1]], "y": [*high, *low[::-1]], "mode": "none"}
            area = {"fill": "toself", "fillcolor": curve.colour, "opacity": 0.15}
            hidden = {"hoverinfo": "skip", "showlegend": False, "legendgroup": curve.label}
            traces.append({**edge, **area, **hidden})
        name = curve.label if curve.runs == 1 else f"{curve.label} ({curve.runs} seeds)"
        line = {"color": curve.colour, "dash": curve.line_style(_LINES)}
        points = {"x": list(curve.x), "y": list(curve.mean), "mode": "lines+markers"}
        legend = {"name": name, "legendgroup": curve.label}
        traces.append({**points, **legend, "marker": {"size": 5}, "line": line})
    labels = rounds["method"].nunique()
    x: dict[str, Any] = {"title": {"text": plot.x_label}}
    if plot.log_x:
        x |= LOG_BYTES
    y = {"title": {"text": plot.label}, "rangemode": "tozero" if plot.from_zero else "normal"}
    shades = _stages(rounds) if stages and plot.against == "round" else {}
    return framed(traces, 360 + 12 * labels, x, y, showlegend=labels > 1, **shades)


def _stages(rounds: pd.DataFrame) -> dict[str, Any]:
    """Return shades and names of the stages, drawn behind a run's curve."""
    shapes, names = [], []
    for stage, own in rounds.groupby("stage", sort=False):
        left, right = float(own["round"].min()) + 0.5, float(own["round"].max()) + 1.5
        whole = {"xref": "x", "yref": "paper"}
        shade = {"fillcolor": _SHADES[str(stage)], "opacity": 0.6, "line": {"width": 0}}
        edges = {"x0": left, "x1": right, "y0": 0, "y1": 1, "layer": "below"}
        shapes.append({"type": "rect", **whole, **shade, **edges})
        place = {"x": left, "y": 0, "xanchor": "left", "yanchor": "bottom", "showarrow": False}
        names.append({"text": str(stage), "font": {"size": 11}, **whole, **place})
    return {"shapes": shapes, "annotations": names}


def _spread(runs: Sequence[RunData]) -> Figure:
    """Return a box with its points for each label, all seeds together."""
    tests = pd.concat([run.tests.assign(method=run.label, seed=run.seed) for run in runs])
    several = tests["method"].nunique() > 1
    kinds = {"accuracy": "global model", "personal_accuracy": "personal model"}
    traces = []
    for i, (label, own) in enumerate(tests.groupby("method", sort=False)):
        for column, kind in kinds.items():
            tested = own[own[column].notna()]
            if tested.empty:
                continue
            name = f"{label}, {kind}" if several else kind
            box = {"type": "box", "orientation": "h", "x": tested[column].tolist(), "name": name}
            marker = {"size": 4, "opacity": 0.5, "color": COLOURS[i % len(COLOURS)]}
            points: dict[str, Any] = {"boxpoints": False}
            if len(tested) <= _MOST_POINTS:
                texts = [_tooltip(row) for row in tested.to_dict("records")]
                points = {"boxpoints": "all", "text": texts}
            traces.append({**box, **points, "jitter": 0.4, "pointpos": 0, "marker": marker})
    y = {"autorange": "reversed", "automargin": True}
    x = {"title": {"text": "accuracy of the client"}}
    return framed(traces, 160 + 60 * len(traces), x, y)


def _tooltip(row: Mapping[Any, Any]) -> str:
    return f"{label_of_client(row)}, seed {row['seed']}, {row['examples']} examples"


def label_of_client(row: Mapping[Any, Any]) -> str:
    """Return the label of a row's client, as in the notes of the run."""
    name = row.get(CLIENT_NAME)
    return client_label(row["client"], None if name is None else {row["client"]: name})


def _partition(partition: pd.DataFrame) -> Figure:
    """Return a heatmap of the number of examples: one row per label, one column per client."""
    names = {}
    if CLIENT_NAME in partition:
        names = dict(zip(partition["client"], partition[CLIENT_NAME], strict=True))
    table = partition.pivot_table(
        index="label", columns="client", values="examples", aggfunc="sum", fill_value=0, sort=False
    ).sort_index(axis=1)
    heat = {
        "type": "heatmap",
        "z": table.to_numpy().tolist(),
        "x": [str(names.get(client, client)) for client in table.columns],
        "y": [str(label) for label in table.index],
        "colorscale": [[0, "#ffffff"], [1, "#08306b"]],
        "colorbar": {"title": {"text": "examples"}, "thickness": 12},
        "hovertemplate": "client %{x}<br>%{y}<br>%{z} examples<extra></extra>",
    }
    x = {"title": {"text": "client"}, "type": "category"}
    y = {"type": "category", "autorange": "reversed", "automargin": True}
    return framed([heat], 140 + 26 * len(table), x, y)
