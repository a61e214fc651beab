"""The tables of a comparison: runs that differ in method and seed. Source: this project."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import pandas as pd

from rayfed_lora.errors import RunError, RunFolderError
from rayfed_lora.pages.curves import accuracies_of_clients
from rayfed_lora.pages.plots import write_plots
from rayfed_lora.pages.report import report_html
from rayfed_lora.pages.table_files import write_table
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs import checksums
from rayfed_lora.runs.checksums import REPORT_FILE
from rayfed_lora.runs.claiming import say
from rayfed_lora.runs.labelled_runs import read_failed, read_runs
from rayfed_lora.runs.reading import read_errors, rounds_so_far
from rayfed_lora.runs.saving import optional_page
from rayfed_lora.runs.seals import damaged
from rayfed_lora.runs.status import Status
from rayfed_lora.storage import RunFolder

# Default target: this share of the best accuracy.
_TARGET_SHARE = 0.95
# Columns of `runs` from a section and key of summary.json. Those of `clients` are accuracies on
# clients' own examples, of the last model and of their own models.
_FROM_SUMMARY = {
    "final_accuracy": ("final", "eval_accuracy"),
    "best_accuracy": ("best", "eval_accuracy"),
    "final_loss": ("final", "eval_loss"),
    "final_macro_f1": ("final", "eval_macro_f1"),
    "final_auc": ("final", "eval_auc"),
    "final_perplexity": ("final", "eval_perplexity"),
    "clients_accuracy": ("clients", "accuracy_mean"),
    "clients_accuracy_worst_tenth": ("clients", "accuracy_worst_tenth"),
    "personal_accuracy": ("clients", "personal_accuracy_mean"),
    "personal_accuracy_worst_tenth": ("clients", "personal_accuracy_worst_tenth"),
    "total_bytes": ("communication", "total_bytes"),
    "bytes_base": ("communication", "bytes_base"),
    "reduction_vs_fedavg": ("communication", "reduction_vs_fedavg"),
    "reduction_vs_fedavg_with_base": ("communication", "reduction_vs_fedavg_with_base"),
}
_TO_TARGET = ("rounds_to_target", "bytes_to_target", "simulated_s_to_target")
# Columns of `runs` with a mean and a standard deviation over seeds.
_AVERAGED = (*_FROM_SUMMARY, "accuracy_per_mb", *_TO_TARGET, "wall_s")


@dataclass(frozen=True)
class Cell:
    """A run of a comparison; its method is the name of a preset or of the user's variant."""

    method: str
    seed: int
    recipe: Recipe
    location: str


@dataclass(frozen=True)
class Ended:
    """A cell that has ended.

    Attributes:
        accuracy: of the last round, None where it failed.
        seconds: wall time in this process.
        error: the reason of a failure, or None.
    """

    cell: Cell
    accuracy: float | None
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class Standing:
    """The progress of a comparison.

    Attributes:
        cells: number of cells.
        running: the running cell, None between two; `status` is its status.
        ended: the ended cells, in order.
    """

    cells: int
    running: Cell | None = None
    status: Status = field(default_factory=Status)
    ended: tuple[Ended, ...] = ()

    def eta_s(self, now: float) -> float | None:
        """Return the remaining seconds by the mean of the ended runs; None before one is known.

        The running one counts by its own rounds, and as the only one where none has ended.
        """
        own, since = self.status.eta_s(now), self.status.training_since
        known = [ended.seconds for ended in self.ended if ended.error is None]
        if not known and own is not None and since is not None:
            known = [now - since + own]
        if not known:
            return None
        left = self.cells - len(self.ended)
        mean = sum(known) / len(known)
        return left * mean if own is None else own + (left - 1) * mean


@dataclass(frozen=True)
class Comparison:
    """The tables of a comparison.

    Attributes:
        runs: one row per run: method, seed, location, error (None where it finished), metrics,
            bytes, accuracy per MB sent, rounds, bytes and simulated seconds to the target (missing
            where not reached), times, SHA-256 of the examples and of the adapter.
        methods: one row per method: number of finished runs, and of the columns of `runs` the mean
            and sample standard deviation over seeds (missing with one seed).
        rounds: rounds.parquet of all runs, with method, seed and `bytes_so_far`, up and down.
        target: the target accuracy.
    """

    runs: pd.DataFrame
    methods: pd.DataFrame
    rounds: pd.DataFrame
    target: float

    @classmethod
    def of(
        cls, cells: Sequence[Cell], failed: Mapping[str, str], target: float | None = None
    ) -> Comparison:
        """Read the finished runs of a comparison.

        `failed` are the reasons, by location, of runs that did not finish; `target` is an accuracy,
        None: 95 % of the best accuracy of any run.

        Raises:
            RunError: none has finished.
        """
        found, failed = [], dict(failed)
        for cell in cells:
            if cell.location not in failed:
                try:
                    found.append((cell, *_read(cell)))
                except RunFolderError as error:
                    # The tables of the other runs are written all the same.
                    failed[cell.location] = str(error)
        if not found:
            reasons = "\n".join(f"{location}: {why}" for location, why in failed.items())
            raise RunError(f"no run of the comparison finished\n{reasons}")
        for line in _changed_data([(cell, summary) for cell, summary, _ in found]):
            say(line)
        rounds = pd.concat([table for _, _, table in found], ignore_index=True)
        best = float(rounds["eval_accuracy"].max())
        target = _TARGET_SHARE * best if target is None else target
        rows = [_row(cell, summary, table, target) for cell, summary, table in found]
        rows += [_key(cell, failed[cell.location]) for cell in cells if cell.location in failed]
        runs = pd.DataFrame(rows)
        return cls(runs, _methods(runs), rounds, target)

    def write(self, folder: RunFolder) -> None:
        """Write runs, methods and rounds as Parquet and CSV, then plots and report if possible.

        Raises:
            RunError: a table cannot be written.
        """
        for name in ("runs", "methods", "rounds"):
            write_table(folder, name, getattr(self, name))
        with optional_page(folder, say):
            runs = read_runs([folder.location], own=True)
            write_plots(folder, self.rounds, accuracies_of_clients(runs))
            page = report_html(runs, read_failed([folder.location]))
            folder.write(REPORT_FILE, page.encode())


def _read(cell: Cell) -> tuple[Mapping[str, Any], pd.DataFrame]:
    folder = RunFolder(cell.location)
    summary = checksums.read_summary(folder)
    if summary is None:
        raise damaged(folder, checksums.SUMMARY_FILE, "it is missing")
    with read_errors(folder):
        rounds = rounds_so_far(folder)
        _row(cell, summary, rounds, inf)  # the summary may lack what a row needs
    rounds.insert(0, "method", cell.method)
    rounds.insert(1, "seed", cell.seed)
    return summary, rounds


def _changed_data(found: Sequence[tuple[Cell, Mapping[str, Any]]]) -> Iterator[str]:
    """Yield a line for each run whose examples are not those of an earlier run of the same data.

    Rows in files, and those that own methods return, may change while a comparison grows.
    """
    first: dict[str, tuple[Cell, str]] = {}
    for cell, summary in found:
        digest = summary.get("data_sha256")  # earlier versions have none
        if digest is None:
            continue
        same = repr((cell.seed, cell.recipe.data, cell.recipe.model))
        earlier, expected = first.setdefault(same, (cell, digest))
        if digest != expected:
            yield (
                f"{cell.location}: its examples (data_sha256 {digest[:12]}) are not those of"
                f" {earlier.location} ({expected[:12]}), and their results cannot be compared:"
                " the source has changed in between; delete the older run and compare again"
            )


def _key(cell: Cell, error: str | None) -> dict[str, Any]:
    return {"method": cell.method, "seed": cell.seed, "location": cell.location, "error": error}


def _row(
    cell: Cell, summary: Mapping[str, Any], rounds: pd.DataFrame, target: float
) -> dict[str, Any]:
    row = _key(cell, None)
    for name, (section, key) in _FROM_SUMMARY.items():
        # Missing where clients are not tested.
        row[name] = (summary.get(section) or {}).get(key)
    megabytes = row["total_bytes"] / 1e6
    # Of a method that sends nothing there is none.
    row["accuracy_per_mb"] = row["final_accuracy"] / megabytes if megabytes else None
    row |= dict.fromkeys(_TO_TARGET)
    reached = rounds[rounds["eval_accuracy"] >= target]
    if not reached.empty:
        first = reached.iloc[0]
        row["rounds_to_target"] = int(first["round"]) + 1
        row["bytes_to_target"] = int(first["bytes_so_far"])
        # Missing where no time is simulated.
        row["simulated_s_to_target"] = first["simulated_so_far"]
    row["wall_s"] = summary["timing"]["wall_s"]
    row["data_sha256"] = summary.get("data_sha256")
    return row | {name: summary[name] for name in ("failed_clients", "adapter_sha256")}


def _methods(runs: pd.DataFrame) -> pd.DataFrame:
    """Return mean and standard deviation over the finished seeds, methods in their first order."""
    done = runs[runs["error"].isna()]
    groups = done.groupby("method", sort=False)
    columns: dict[str, Any] = {"runs": groups.size()}
    for name in _AVERAGED:
        values = groups[name]
        # No mean where some seed did not reach the target.
        whole = values.count() == groups.size()
        columns[f"{name}_mean"] = values.mean().where(whole)
        columns[f"{name}_std"] = values.std().where(whole)
    return pd.DataFrame(columns).reset_index()
