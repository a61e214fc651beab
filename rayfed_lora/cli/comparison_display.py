"""A comparison in the terminal. Source: this project, on rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isnan
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.runs.status import headline
from rayfed_lora.units import duration, megabytes, percent

if TYPE_CHECKING:
    from rayfed_lora.pages.comparison_tables import Comparison, Ended, Standing


@contextmanager
def watching_comparison(console: PlainConsole) -> Iterator[Callable[[Standing], None]]:
    """Show a comparison on a console: a line per ended run, and the progress of the current one.

    Yields the function to call with each standing.
    """
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
            line.update(f"{at}: {headline(status)}")

        yield show


def _ended(ended: Ended) -> str:
    name = f"{ended.cell.method}, seed {ended.cell.seed}"
    if ended.error is not None:
        return f"{name}: failed: {ended.error}"
    return f"{name}: accuracy {ended.accuracy:.4f} in {duration(ended.seconds)}"


def show_comparison(console: PlainConsole, comparison: Comparison, location: str) -> None:
    """Print a comparison's methods, the runs that failed, and the folder of its tables."""
    table = Table("method", "runs", "final", "best", "sent", "saved", "with base", "per MB")
    table.add_column(f"to {comparison.target:.3f}")
    table.add_column("time")
    table.box = box.SIMPLE
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
