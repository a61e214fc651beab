"""A comparison or a search in the terminal. Source: this project, on rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isnan
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.runs.status import headline
from rayfed_lora.units import duration, megabytes, percent

if TYPE_CHECKING:
    import pandas as pd

    from rayfed_lora.pages.comparison_tables import Comparison, Ended, Standing
    from rayfed_lora.pages.search_page import SearchNews


@contextmanager
def watching_comparison(console: PlainConsole) -> Iterator[Callable[[Standing], None]]:
    """Show a line per ended run and the current run's progress; yield the function to call."""
    ended_shown, location, notes_shown = 0, "", 0
    with console.status("starting") as line:

        def show(standing: Standing) -> None:
            nonlocal ended_shown, location, notes_shown
            for ended in standing.ended[ended_shown:]:
                console.print_line(_ended(ended))
            ended_shown = len(standing.ended)
            cell, status = standing.running, standing.status
            if cell is None:
                return
            if location != cell.location:
                location, notes_shown = cell.location, 0
            for note in status.notes[notes_shown:]:
                console.warn(note)
            notes_shown = len(status.notes)
            at = f"run {ended_shown + 1}/{standing.cells}: {cell.method}, seed {cell.seed}"
            line.update(Text(f"{at}: {headline(status)}"))

        yield show


def _ended(ended: Ended) -> str:
    name = f"{ended.cell.method}, seed {ended.cell.seed}"
    if ended.error is not None:
        return f"{name}: failed: {ended.error}"
    return f"{name}: accuracy {ended.accuracy:.4f} in {duration(ended.seconds)}"


def show_comparison(console: PlainConsole, comparison: Comparison, location: str) -> None:
    """Print a comparison's methods, the runs that failed, and the folder of its tables."""
    names = ["method", "runs", "final", "best", "sent", "saved", "with base", "per MB"]
    table = Table(*names, f"to {comparison.target:.3f}", "time", box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in comparison.methods.to_dict("records"):
        rounds, sent = row["rounds_to_target_mean"], row["bytes_to_target_mean"]
        reached = "-" if isnan(rounds) else f"{rounds:.3g} rounds, {megabytes(sent)}"
        table.add_row(
            row["method"],
            str(row["runs"]),
            _mean(row, "final_accuracy"),
            _mean(row, "best_accuracy"),
            megabytes(row["total_bytes_mean"]),
            percent(row["reduction_vs_fedavg_mean"]),
            percent(row["reduction_vs_fedavg_with_base_mean"]),
            f"{row['accuracy_per_mb_mean']:.3g}",
            reached,
            duration(row["wall_s_mean"]),
        )
    console.print(table)
    console.print_line("mean (standard deviation) over seeds; saved: bytes against FedAvg's")
    for row in comparison.runs[comparison.runs["error"].notna()].to_dict("records"):
        console.print_line(f"failed: {row['method']}, seed {row['seed']}: {row['error']}")
    console.print_line(f"tables: {location}")


def _mean(row: Mapping[Any, Any], name: str) -> str:
    mean, deviation = row[f"{name}_mean"], row[f"{name}_std"]
    return f"{mean:.4f}" if isnan(deviation) else f"{mean:.4f} ({deviation:.4f})"


@contextmanager
def watching_search(console: PlainConsole) -> Iterator[Callable[[SearchNews], None]]:
    """Show a line per ended trial and the running ones' progress; yield the function to call."""
    with console.status("starting") as line:

        def show(news: SearchNews) -> None:
            if news.warning is not None:
                console.warn(news.warning)
            if news.ended is not None:
                console.print_line("trial {}: {}".format(*news.ended))
            rounds = ", ".join(str(done) for done in news.running.values())
            line.update(
                Text(f"{len(news.running)} of {news.trials} trials running, rounds {rounds}")
            )

        yield show


def show_search(
    console: PlainConsole, trials: pd.DataFrame, best: Mapping[str, str], location: str
) -> None:
    """Print the best trial by each objective, the failed trials, and the folder of the search."""
    counts = trials["status"].value_counts()
    console.print_line(", ".join(f"{count} {status}" for status, count in counts.items()))
    metrics = [name for name in best if name in trials]
    table = Table("best by", "trial", *metrics, "recipe", box=box.SIMPLE)
    for name, trial in best.items():
        row = trials[trials["trial"] == trial].to_dict("records")[0]
        numbers = [
            megabytes(row[metric]) if "bytes" in metric else f"{row[metric]:.4f}"
            for metric in metrics
        ]
        table.add_row(name.replace("_", " "), trial, *numbers, f"best-{name}.yaml")
    console.print(table)
    for row in trials[trials["error"].notna()].to_dict("records"):
        console.print_line(f"failed: {row['trial']}: {row['error']}")
    console.print_line(f"recipes, tables and report: {location}")
