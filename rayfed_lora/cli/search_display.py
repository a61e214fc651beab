"""A search in the terminal. Source: this project, on rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.units import megabytes

if TYPE_CHECKING:
    import pandas as pd

    from rayfed_lora.pages.search_page import SearchNews


@contextmanager
def watching_search(console: PlainConsole) -> Iterator[Callable[[SearchNews], None]]:
    """Show a search on a console: a line per ended trial, and the progress of the running ones.

    Yields the function to call with each piece of news.
    """
    with console.status("starting") as line:

        def show(news: SearchNews) -> None:
            if news.warning is not None:
                console.warn(news.warning)
            if news.ended is not None:
                console.print_line("trial {}: {}".format(*news.ended))
            rounds = ", ".join(str(done) for done in news.running.values())
            line.update(f"{len(news.running)} of {news.trials} trials running, rounds {rounds}")

        yield show


def show_search(
    console: PlainConsole, trials: pd.DataFrame, best: Mapping[str, str], location: str
) -> None:
    """Print the best trials of a search, the failed ones, and the folder of its results.

    Args:
        console: to print to.
        trials: rows of trials.parquet.
        best: trial by objective.
        location: of the search.
    """
    counts = trials["status"].value_counts()
    console.print_line(", ".join(f"{count} {status}" for status, count in counts.items()))
    metrics = [name for name in best if name in trials]
    table = Table("best by", "trial", *metrics, "recipe")
    table.box = box.SIMPLE
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
