"""The report of runs: one self-contained HTML file. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa

from rayfed_lora.errors import BadInputError, RunError, RunFolderError
from rayfed_lora.locations import child, parent
from rayfed_lora.pages.figures import figures, label_of_client, partitions
from rayfed_lora.pages.page import Rows, even, page, shown
from rayfed_lora.pages.search_page import TRIALS_FILE, read_search, search_html
from rayfed_lora.runs.checksums import REPORT_FILE
from rayfed_lora.runs.labelled_runs import FailedRun, read_failed, read_runs
from rayfed_lora.runs.outcome import ending, exported_scores, kept_model
from rayfed_lora.runs.reading import RunData
from rayfed_lora.runs.summary import client_summary
from rayfed_lora.runs.tables import PROPOSAL_COLUMNS
from rayfed_lora.storage import RunFolder
from rayfed_lora.units import duration, megabytes, percent

_WORST = 50


def report(locations: Sequence[str], to: str | None = None) -> str:
    """Write the report of runs and comparisons, or of a search; return the file's location.

    Args:
        locations: folders or URIs; the folder of a search must be the only one.
        to: path or URI of the file; None: report.html in the only folder, or in the current one.

    Raises:
        BadInputError: no location, or `to` does not end in .html.
        RunFolderError: one of them has nothing to report.
        RunError: the file cannot be written.
    """
    if not locations:
        raise BadInputError("report: expected at least one run folder, got none")
    if to is None:
        to = child(locations[0], REPORT_FILE) if len(locations) == 1 else REPORT_FILE
    folder, name = parent(to)
    if not name.endswith(".html"):
        raise BadInputError(f"--out: expected a file that ends in .html, got {to!r}")
    try:
        content = _content(locations).encode()
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunFolderError(
            f"{', '.join(locations)}: expected folders as rayfed-lora writes them; their"
            f" content cannot be shown: {type(error).__name__}: {error}"
        ) from error
    try:
        RunFolder(folder).write(name, content)
    except RunError as error:
        raise RunError(f"{error}; --out FILE.html writes it elsewhere") from error
    return to


def _content(locations: Sequence[str]) -> str:
    searches = [location for location in locations if RunFolder(location).exists(TRIALS_FILE)]
    if not searches:
        return report_html(read_runs(locations), read_failed(locations))
    if len(locations) > 1:
        raise BadInputError(
            f"report: expected the folder of a search alone, got {searches[0]} and others; its"
            " trials are run folders as well"
        )
    return search_html(read_search(RunFolder(locations[0]).confined()))


def report_html(runs: Sequence[RunData], failed: Sequence[FailedRun] = ()) -> str:
    """Return the page of one or more runs; `failed` ones of a comparison did not finish."""
    unfinished = [{"run": f.label, "seed": str(f.seed), "error": f.error} for f in failed]
    several = len(runs) > 1
    return page(
        f"{len(runs)} runs" if several else runs[0].name,
        "curves are means over seeds, bands one standard deviation" if several else "",
        even([_overview(run) for run in runs]),
        figures(runs),
        partitions(runs),
        clients=even([row for run in runs for row in _clients(run)]),
        failures=even([*unfinished, *(row for run in runs for row in _failures(run))]),
        runs=[(run, _details(run)) for run in runs],
    )


def _overview(run: RunData) -> dict[str, str]:
    facts = {"run": run.label, "method": run.method, "seed": str(run.seed)}
    facts["rounds"] = str(len(run.rounds))
    if run.summary is None:
        return {**facts, "last test accuracy": "not finished"}
    final, best = run.summary["final"], run.summary["best"]
    sent, simulation = run.summary["communication"], run.summary.get("simulation")
    facts |= {
        "last test accuracy": shown(final["eval_accuracy"]),
        "best test accuracy": f"{shown(best['eval_accuracy'])} (round {best['round'] + 1})",
        "test macro F1": shown(final["eval_macro_f1"]),
        "test AUC": shown(final["eval_auc"]),
        "test loss": shown(final["eval_loss"]),
        "test perplexity": shown(final["eval_perplexity"]),
        "sent in total": megabytes(sent["total_bytes"]),
        "less than FedAvg": percent(sent["reduction_vs_fedavg"]),
        "failed": str(run.failed),
        "time": duration(run.summary["timing"]["wall_s"]),
    }
    said = {"exported": kept_model(run.summary), "stopped by": ending(run.summary)}
    facts |= {key: text for key, text in said.items() if text is not None}
    if "kept" in run.summary:
        facts["test accuracy of the exported"] = shown(
            exported_scores(run.summary)["eval_accuracy"]
        )
    if simulation is not None:
        facts["simulated time"] = duration(simulation["total_s"])
        facts["dropped clients"] = str(simulation["dropped_clients"])
    return facts


def _details(run: RunData) -> dict[str, Rows]:
    """Return the tables of one run, by title."""
    found = {
        "Communication": _bill(run.summary["communication"]) if run.summary else [],
        "Annealing record": _proposals(run.rounds),
        "The worst 10 % of clients": _worst(run.tests),
        "Notes": _notes(run),
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
    return _rows(found[["round", *PROPOSAL_COLUMNS]].assign(round=found["round"] + 1))


def _clients(run: RunData) -> Rows:
    """Return the spread of a run's accuracy over its clients."""
    if run.tests.empty:
        return []
    spread = client_summary(pa.Table.from_pandas(run.tests, preserve_index=False))
    numbers = {name.replace("_", " "): shown(value) for name, value in spread.items()}
    return [{"run": run.label, "seed": str(run.seed), **numbers}]


def _worst(tests: pd.DataFrame) -> Rows:
    if tests.empty:
        return []
    tenth = tests.nsmallest(max(len(tests) // 10, 1), "accuracy").head(_WORST)
    return _rows(tenth.drop(columns="round"))


def _rows(table: pd.DataFrame) -> Rows:
    """Return the rows of a table, but for its empty columns."""
    return [
        {str(name).replace("_", " "): shown(value) for name, value in row.items()}
        for row in table.dropna(axis="columns", how="all").to_dict("records")
    ]


def _notes(run: RunData) -> Rows:
    """Return the notes of a run; those of failed clients are in the table of failures."""
    failed = {
        f"{label_of_client(row)} failed: {row['error']}" for row in run.failures.to_dict("records")
    }
    return [
        {"round": str(row["round"] + 1), "note": str(row["text"])}
        for row in run.notes.to_dict("records")
        if row["text"] not in failed
    ]


def _failures(run: RunData) -> Rows:
    rows = []
    for row in run.failures.to_dict("records"):
        client, error = label_of_client(row).removeprefix("client "), str(row["error"])
        place = {"run": run.label, "seed": str(run.seed), "round": str(row["round"] + 1)}
        rows.append({**place, "client": client, "error": error})
    left = run.failed - len(rows)
    return rows if left == 0 else [*rows, {"run": run.label, "error": f"and {left} more"}]
