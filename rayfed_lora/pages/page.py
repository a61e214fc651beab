"""A self-contained HTML page of tables and interactive plots. Source: this project."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader

from rayfed_lora.pages.figures import Figure

_NOTHING = "-"
Rows = list[dict[str, str]]
Figures = Iterable[tuple[str, Figure]]


def page(
    title: str,
    subtitle: str,
    overview: Rows,
    figures: Figures,
    partitions: Figures = (),
    **more: Any,
) -> str:
    """Return the HTML.

    Args:
        title: heading.
        subtitle: after the name of the report.
        overview: the first table.
        figures: titles and plots, two in a row; a plot with `meta` "wide" has its own row.
        partitions: labels and heatmaps of the label distributions.
        more: `clients` and `failures` (tables), `runs` (runs with the tables of their details).
    """
    from plotly.offline import get_plotlyjs

    environment = Environment(loader=PackageLoader("rayfed_lora.pages"), autoescape=True)
    return environment.get_template("report.html.j2").render(
        title=title,
        subtitle=subtitle,
        plotly=get_plotlyjs(),
        overview=overview,
        figures=[
            (name, _html(figure), figure["layout"].get("meta") == "wide")
            for name, figure in figures
        ],
        partitions=[(label, _html(figure)) for label, figure in partitions],
        **more,
    )


def _html(figure: Figure) -> str:
    from plotly.io import to_html

    config = {"responsive": True, "displaylogo": False}
    return str(to_html(figure, config, full_html=False, include_plotlyjs=False, validate=False))


def even(rows: Rows) -> Rows:
    """Return rows with the columns of all of them, but for columns without any value."""
    names = dict.fromkeys(name for row in rows for name in row)
    used = [n for n in names if any(row.get(n, _NOTHING) != _NOTHING for row in rows)]
    return [{name: row.get(name, "") for name in used} for row in rows]


def shown(value: Any) -> str:
    """Return a value as text: floats with four significant digits, `-` for none."""
    if pd.isna(value):
        return _NOTHING
    return f"{value:.4g}" if isinstance(value, float) else str(value)
