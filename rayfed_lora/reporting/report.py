"""report.html of one run: self-contained, plots as inline SVG. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import pyarrow as pa
from jinja2 import Environment, PackageLoader

from rayfed_lora.recipe import Recipe
from rayfed_lora.recipe_loading import recipe_yaml
from rayfed_lora.reporting.progress import megabytes

_SHADES = {
    "initiating": "#e8eef4",
    "heating": "#fbe9d9",
    "cooling": "#dcebf7",
    "holding": "#eef3ea",
}
_PROPOSAL = (
    "round",
    "proposed_rank",
    "verdict",
    "energy_current",
    "energy_proposed",
    "temperature",
    "acceptance_probability",
    "target_metric",
    "target_value",
)


def report_html(recipe: Recipe, summary: Mapping[str, Any], rounds: pa.Table) -> str:
    """Return the page.

    Args:
        recipe: the run.
        summary: content of summary.json.
        rounds: rows of rounds.parquet.
    """
    rows = rounds.to_pylist()
    environment = Environment(loader=PackageLoader("rayfed_lora.reporting"), autoescape=True)
    template = environment.get_template("report.html.j2")
    return template.render(
        summary=summary,
        bill=_bill(summary["communication"]),
        figures=_figures(rows),
        proposals=_proposals(rows),
        recipe=recipe_yaml(recipe),
    )


def _bill(communication: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for name, value in communication.items():
        label = name.replace("_", " ")
        if value is None:
            lines.append((label, "-"))
        elif name.startswith("reduction"):
            lines.append((label, f"{100 * value:.2f} %"))
        else:
            lines.append((label, megabytes(value)))
    return lines


def _proposals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = [row for row in rows if row["verdict"] is not None]
    used = [c for c in _PROPOSAL if any(row[c] is not None for row in found)]
    return [{column: _rounded(row[column]) for column in used} for row in found]


def _rounded(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _figures(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    sent = [row["bytes_up"] + row["bytes_down"] for row in rows]
    total = [sum(sent[: i + 1]) / 1e6 for i in range(len(sent))]
    return [
        ("Accuracy on the test split", _figure(rows, "eval_accuracy", "accuracy")),
        ("Training loss", _figure(rows, "train_loss", "loss")),
        ("Rank", _figure(rows, "rank", "mean rank over modules", from_zero=True)),
        (
            "Sent so far",
            _figure(
                [{**row, "sent": t} for row, t in zip(rows, total, strict=True)],
                "sent",
                "MB, up and down",
                from_zero=True,
            ),
        ),
    ]


def _figure(
    rows: Sequence[Mapping[str, Any]], column: str, label: str, *, from_zero: bool = False
) -> str:
    """Return one column against the round as SVG, the stages shaded behind it."""
    # The object interface of matplotlib: no global state, no window system.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    points = [(row["round"] + 1, row[column]) for row in rows if row[column] is not None]
    for stage, shade in _SHADES.items():
        inside = [row["round"] + 1 for row in rows if row["stage"] == stage]
        if inside:
            axes.axvspan(inside[0] - 0.5, inside[-1] + 0.5, color=shade, label=stage, lw=0)
    axes.plot([x for x, _ in points], [y for _, y in points], marker="o", ms=3, color="#1f5f99")
    axes.set(xlabel="round", ylabel=label, xlim=(0.5, len(rows) + 0.5))
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=4, frameon=False, fontsize=8)
    out = StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :]
