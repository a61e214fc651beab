"""A report of one or many runs: one HTML file with all it needs in it. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
from jinja2 import Environment, PackageLoader

from rayfed_lora.errors import BadInputError
from rayfed_lora.reporting.figures import Figure, figures, partitions
from rayfed_lora.reporting.progress import duration, megabytes, percent
from rayfed_lora.reporting.run_data import RunData, read_runs
from rayfed_lora.reporting.summary import client_summary
from rayfed_lora.storage import RunFolder

REPORT_FILE = "report.html"
_PROPOSAL = (
    "round",
    "proposed_rank",
    "verdict",
    "energy_current",
    "energy_proposed",
    "temperature",
    "acceptance_probability",
    "acceptance_draw",
    "target_metric",
    "target_value",
)
_WORST = 50
_NOTHING = "-"
Rows = list[dict[str, str]]


def report(locations: Sequence[str], to: str | None = None) -> str:
    """Write the report of run folders and comparisons' folders.

    Args:
        locations: folders or URIs.
        to: path or URI of the file; None: report.html in the folder, with several in this one.

    Returns:
        Where it is.

    Raises:
        BadInputError: no location, or `to` does not end in .html.
        RunFolderError: one of them has nothing to report.
        RunError: the file cannot be written.
    """
    if not locations:
        raise BadInputError("report: expected at least one run folder, got none")
    if to is None:
        to = f"{locations[0].rstrip('/')}/{REPORT_FILE}" if len(locations) == 1 else REPORT_FILE
    if not to.endswith(".html"):
        raise BadInputError(f"--out: expected a file that ends in .html, got {to!r}")
    folder, slash, name = to.rpartition("/")
    RunFolder(folder or slash or ".").write(name, report_html(read_runs(locations)).encode())
    return to


def report_html(runs: Sequence[RunData]) -> str:
    """Return the page.

    Args:
        runs: at least one.
    """
    from plotly.offline import get_plotlyjs

    environment = Environment(loader=PackageLoader("rayfed_lora.reporting"), autoescape=True)
    return environment.get_template("report.html.j2").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        plotly=get_plotlyjs(),
        overview=_even([_overview(run) for run in runs]),
        figures=[(title, _html(figure)) for title, figure in figures(runs)],
        clients=_even([row for run in runs for row in _clients(run)]),
        partitions=[(label, _html(figure)) for label, figure in partitions(runs)],
        failures=_even([row for run in runs for row in _failures(run)]),
        runs=[(run, _details(run)) for run in runs],
    )


def _html(figure: Figure) -> str:
    from plotly.io import to_html

    config = {"responsive": True, "displaylogo": False}
    text: str = to_html(
        figure, full_html=False, include_plotlyjs=False, validate=False, config=config
    )
    return text


def _even(rows: Rows) -> Rows:
    """Return rows with the columns of all of them, but for those that say nothing in any."""
    names = dict.fromkeys(name for row in rows for name in row)
    said = [n for n in names if any(row.get(n, _NOTHING) != _NOTHING for row in rows)]
    return [{name: row.get(name, "") for name in said} for row in rows]


def _overview(run: RunData) -> dict[str, str]:
    facts = {
        "run": run.label,
        "method": run.method,
        "seed": str(run.seed),
        "rounds": str(len(run.rounds)),
    }
    if run.summary is None:
        return {**facts, "final accuracy": "not finished"}
    final, best = run.summary["final"], run.summary["best"]
    sent, timing = run.summary["communication"], run.summary["timing"]
    return {
        **facts,
        "final accuracy": _number(final["eval_accuracy"]),
        "best": f"{_number(best['eval_accuracy'])} (round {best['round'] + 1})",
        "macro F1": _number(final["eval_macro_f1"]),
        "AUC": _number(final["eval_auc"]),
        "loss": _number(final["eval_loss"]),
        "perplexity": _number(final["eval_perplexity"]),
        "sent": megabytes(sent["total_bytes"]),
        "less than FedAvg": percent(sent["reduction_vs_fedavg"]),
        "failed": str(run.failed),
        "time": duration(timing["wall_s"]),
    }


def _details(run: RunData) -> dict[str, Rows]:
    """Return the tables of one run, by title."""
    found = {
        "Communication": _bill(run.summary["communication"]) if run.summary else [],
        "Annealing record": _proposals(run.rounds),
        "The worst 10 % of clients": _worst(run.tests),
        "Versions": [dict(run.summary["versions"])] if run.summary else [],
    }
    return {title: rows for title, rows in found.items() if rows}


def _bill(communication: Mapping[str, Any]) -> Rows:
    rows = []
    for name, value in communication.items():
        shown = percent(value) if name.startswith("reduction") else megabytes(value or 0)
        rows.append({"": name.replace("_", " "), "whole run": shown})
    return rows


def _proposals(rounds: pd.DataFrame) -> Rows:
    found = rounds[rounds["verdict"].notna()]
    used = [column for column in _PROPOSAL if found[column].notna().any()]
    shown = found[used].assign(round=found["round"] + 1) if used else found[used]
    return [
        {str(name).replace("_", " "): _number(value) for name, value in row.items()}
        for row in shown.to_dict("records")
    ]


def _clients(run: RunData) -> Rows:
    """Return how a run's accuracy is spread over clients."""
    if run.tests.empty:
        return []
    spread = client_summary(pa.Table.from_pandas(run.tests, preserve_index=False))
    numbers = {name.replace("_", " "): _number(value) for name, value in spread.items()}
    return [{"run": run.label, "seed": str(run.seed), **numbers}]


def _worst(tests: pd.DataFrame) -> Rows:
    if tests.empty:
        return []
    tenth = tests.nsmallest(max(len(tests) // 10, 1), "accuracy").head(_WORST)
    used = tenth.drop(columns="round").dropna(axis="columns", how="all")
    return [
        {str(name).replace("_", " "): _number(value) for name, value in row.items()}
        for row in used.to_dict("records")
    ]


def _failures(run: RunData) -> Rows:
    rows = [
        {
            "run": run.label,
            "seed": str(run.seed),
            "round": str(row["round"] + 1),
            "client": str(row["client"]),
            "error": str(row["error"]),
        }
        for row in run.failures.to_dict("records")
    ]
    left = run.failed - len(rows)
    return rows if left == 0 else [*rows, {"run": run.label, "error": f"and {left} more"}]


def _number(value: Any) -> str:
    if pd.isna(value):
        return _NOTHING
    return f"{value:.4g}" if isinstance(value, float) else str(value)
