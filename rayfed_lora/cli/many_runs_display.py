"""A comparison or a search in the terminal. Source: this project, on rich."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isnan
from typing import TYPE_CHECKING, Any

from rich.text import Text

from rayfed_lora.cli.console import PlainConsole, fitted
from rayfed_lora.cli.next_steps import command, same_command
from rayfed_lora.locations import child
from rayfed_lora.plugins.modules import flags
from rayfed_lora.units import duration, megabytes, percent

if TYPE_CHECKING:
    from rayfed_lora.pages.comparison_tables import Comparison, Ended, Standing
    from rayfed_lora.pages.search_page import SearchNews
    from rayfed_lora.tuning.search_result import SearchResult

# Running trials whose rounds are shown.
_MOST_SHOWN = 4


@contextmanager
def _one_line(console: PlainConsole) -> Iterator[Callable[[str, float | None], None]]:
    """Show one live line; yield the function that sets its text and the remaining seconds."""
    began = time.monotonic()
    with console.status("importing") as line:

        def update(text: str, eta_s: float | None) -> None:
            spent = duration(time.monotonic() - began)
            # Two columns are the spinner's.
            parts = [(0, text), (2, f"elapsed {spent}")]
            if eta_s is not None:
                parts.insert(1, (1, f"ETA {duration(eta_s)}"))
            line.update(Text(fitted(console.width - 2, parts)))

        yield update


@contextmanager
def watching_comparison(
    console: PlainConsole, location: str
) -> Iterator[Callable[[Standing], None]]:
    """Show a line per ended run and the current run's progress; yield the function to call.

    Its first call prints the folder `location` of the comparison.
    """
    ended_shown, running, notes_shown = 0, "", 0
    with _one_line(console) as update:

        def show(standing: Standing) -> None:
            from rayfed_lora.runs.status import headline

            nonlocal ended_shown, running, notes_shown
            if ended_shown == 0 and running == "":
                console.print_facts({"comparison": location})
            for ended in standing.ended[ended_shown:]:
                console.print_line(_ended(ended))
            ended_shown = len(standing.ended)
            cell, status = standing.running, standing.status
            if cell is None:
                running = running or "-"
                if ended_shown == standing.cells:
                    update("writing tables, plots and report", None)
                return
            if running != cell.location:
                running, notes_shown = cell.location, 0
            for note in status.notes[notes_shown:]:
                console.warn(note)
            notes_shown = len(status.notes)
            at = f"run {ended_shown + 1}/{standing.cells}: {cell.method}, seed {cell.seed}"
            update(f"{at}: {headline(status)}", standing.eta_s(time.time()))

        yield show


def _ended(ended: Ended) -> str:
    name = f"{ended.cell.method}, seed {ended.cell.seed}"
    if ended.error is not None:
        return f"{name}: failed: {ended.error}"
    return f"{name}: test accuracy {ended.accuracy:.4f} in {duration(ended.seconds)}"


def show_comparison(console: PlainConsole, comparison: Comparison, location: str) -> None:
    """Print a comparison's methods, the runs that failed, and where its tables are."""
    goal = f"{comparison.target:.3f}"
    rows = [_method(row, goal) for row in comparison.methods.to_dict("records")]
    optional = ("accuracy per MB", "saved with base", "runs", f"sent to {goal}", "time")
    console.print_rows(rows, optional=(*optional, f"rounds to {goal}", "saved", "sent in total"))
    console.print_line(
        "test accuracy of the last and of the best round, mean (standard deviation) over seeds;"
        " saved: bytes against FedAvg's"
    )
    failed = comparison.runs[comparison.runs["error"].notna()].to_dict("records")
    for row in failed:
        console.print_line(f"failed: {row['method']}, seed {row['seed']}: {row['error']}")
    facts = {"tables": location, "report": child(location, "report.html")}
    console.print_facts(facts | ({"to resume": same_command()} if failed else {}))


def _method(row: Mapping[Any, Any], goal: str) -> dict[str, str]:
    """Return a row of the table of methods."""
    rounds, sent = row["rounds_to_target_mean"], row["bytes_to_target_mean"]
    return {
        "method": row["method"],
        "runs": str(row["runs"]),
        "last test accuracy": _mean(row, "final_accuracy"),
        "best test accuracy": _mean(row, "best_accuracy"),
        "sent in total": megabytes(row["total_bytes_mean"]),
        "saved": percent(row["reduction_vs_fedavg_mean"]),
        "saved with base": percent(row["reduction_vs_fedavg_with_base_mean"]),
        "accuracy per MB": f"{row['accuracy_per_mb_mean']:.3g}",
        f"rounds to {goal}": "-" if isnan(rounds) else f"{rounds:.3g}",
        f"sent to {goal}": "-" if isnan(sent) else megabytes(sent),
        "time": duration(row["wall_s_mean"]),
    }


def _mean(row: Mapping[Any, Any], name: str) -> str:
    mean, deviation = row[f"{name}_mean"], row[f"{name}_std"]
    return f"{mean:.4f}" if isnan(deviation) else f"{mean:.4f} ({deviation:.4f})"


@contextmanager
def watching_search(
    console: PlainConsole, places: list[str]
) -> Iterator[Callable[[SearchNews], None]]:
    """Show a line per ended trial and the running ones' progress; yield the function to call.

    The search's folder is added to `places`.
    """
    began: tuple[float, float] | None = None
    with _one_line(console) as update:

        def show(news: SearchNews) -> None:
            nonlocal began
            if news.location is not None:
                places.append(news.location)
                console.print_facts({"search": news.location})
            if news.warning is not None:
                console.warn(news.warning)
            if news.ended is not None:
                console.print_line(_trial(*news.ended, news.drawn))
            if news.trials == 0:
                return update("starting", None)
            now = time.monotonic()
            began = began or (now, news.trials_done)
            rate = (news.trials_done - began[1]) / max(now - began[0], 1e-9)
            eta_s = (news.trials - news.trials_done) / rate if rate > 0 else None
            rounds = ", ".join(f"{done}/{news.rounds}" for done in news.running.values())
            text = f"{news.done} of {news.trials} trials done, {len(news.running)} running"
            update(text + (f": round {rounds}" if len(news.running) <= _MOST_SHOWN else ""), eta_s)
            return None

        yield show


def _trial(trial: str, outcome: str, drawn: Mapping[str, Any]) -> str:
    """Return a line about an ended trial: its outcome and the values that were drawn for it."""
    from rayfed_lora.pages.curves import short
    from rayfed_lora.pages.page import shown

    values = ", ".join(f"{short(key)} {shown(value)}" for key, value in drawn.items())
    return f"trial {trial}: {outcome}" + (f" ({values})" if values else "")


def show_search(
    console: PlainConsole, found: SearchResult, drawn: Sequence[str], plugins: Sequence[str] = ()
) -> None:
    """Print the best trial by each objective, failed trials, the folder, and the next command.

    `drawn` are the recipe keys that the search has drawn, `plugins` modules that it may use.
    """
    from rayfed_lora.pages.curves import short
    from rayfed_lora.pages.page import shown

    trials = found.trials
    counts = trials["status"].value_counts()
    console.print_line(", ".join(f"{count} {status}" for status, count in counts.items()))
    metrics = [name for name in found.best if name in trials]
    keys = [key for key in drawn if key in trials]
    rows = []
    for name, trial in found.best.items():
        row = trials[trials["trial"] == trial].to_dict("records")[0]
        numbers = {
            short(metric): megabytes(row[metric]) if "bytes" in metric else f"{row[metric]:.4f}"
            for metric in metrics
        }
        best = {"best by": short(name), "trial": trial, **numbers, "recipe": f"best-{name}.yaml"}
        rows.append(best | {short(key): shown(row[key]) for key in keys})
    console.print_rows(rows, optional=[short(key) for key in reversed(keys)], left=["recipe"])
    for row in trials[trials["error"].notna()].to_dict("records"):
        console.print_line(f"failed: {row['trial']}: {row['error']}")
    facts = {"search": found.location, "report": child(found.location, "report.html")}
    facts["best"] = command("run", child(found.location, "best.yaml"), *flags(plugins))
    console.print_facts(facts)
