"""Plans and summaries as tables for the terminal. Source: this project, on rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isnan
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from rayfed_lora.cli.plan_rows import shown_rounds
from rayfed_lora.printable import one_note
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.status import headline
from rayfed_lora.units import duration, megabytes, percent

if TYPE_CHECKING:
    import pandas as pd

    from rayfed_lora.launching.planning import Plan
    from rayfed_lora.pages.comparison import Comparison, Ended, Standing
    from rayfed_lora.pages.search import SearchNews


def show_plan(console: Console, recipe: Recipe, plan: Plan) -> None:
    """Print the schedule round by round, the bill, and what the run will need."""
    shape, examples = plan.outline.shape, plan.outline.devices.sizes
    console.print(
        f"{recipe.name}: {recipe.method}, {len(plan.rounds)} rounds,"
        f" {len(examples)} clients with {examples.min()} to {examples.max()} examples,"
        f" {len(plan.outline.label_names)} classes, {plan.outline.test_examples} test examples",
        highlight=False,
    )
    console.print(
        f"model of {shape.total_params:,} parameters, {len(shape.modules)} adapted modules,"
        f" head of {shape.head_params:,}",
        highlight=False,
    )
    timed = plan.rounds[0].simulated_s is not None
    table = Table("round", "stage", "rank", "trained", "lr", "clients", "up", "down", "base")
    if timed:
        table.add_column("simulated")
    table.box = box.SIMPLE
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header in ("round", "stage") else "right"
    rows = shown_rounds(plan.rounds)
    for row in rows:
        if isinstance(row, range):
            table.add_row("...", f"{len(row):,} rounds")
            continue
        r = plan.rounds[row]
        rank = "full" if r.rank is None else str(r.rank)
        table.add_row(
            str(r.round),
            r.stage,
            rank,
            f"{r.trainable_params:,}",
            f"{r.learning_rate:.3g}",
            str(r.clients) if r.arriving == r.clients else f"{r.arriving} of {r.clients}",
            megabytes(r.bytes_up),
            megabytes(r.bytes_down),
            megabytes(r.bytes_base),
            *([duration(r.simulated_s)] if timed else []),
        )
    console.print(table)
    left_out = sum(len(row) for row in rows if isinstance(row, range))
    if left_out > 0:
        console.print(
            f"{left_out:,} of {len(plan.rounds):,} rounds are not shown;"
            " rayfed_lora.plan(recipe).rounds has all of them",
            highlight=False,
        )
    if recipe.annealing.feedback != "always":
        console.print(f"if every proposal is accepted (acceptance {recipe.annealing.feedback})")
    if recipe.annealing.allocation == "spectral":
        console.print("spectral allocation: ranks are the mean, bytes an upper bound")
    console.print(_bill(plan.totals.communication()))
    for need in plan.needs:
        console.print(need, highlight=False)
    for note in plan.notes:
        console.print(
            f"warning: {one_note(note)}",
            style="yellow",
            highlight=False,
            markup=False,
        )


def show_summary(console: Console, summary: Mapping[str, Any], location: str) -> None:
    """Print a finished run's metrics and bill, and where its folder is."""
    final, best, timing = summary["final"], summary["best"], summary["timing"]
    # Of language models only.
    shown = ["accuracy", "loss"] + ["perplexity"] * (final["eval_perplexity"] is not None)
    table = Table("", *shown, "round", title=f"{summary['name']} ({summary['method']})")
    for name, row in (("final", final), ("best", best)):
        numbers = [_metric(row[f"eval_{metric}"]) for metric in shown]
        table.add_row(name, *numbers, str(row["round"] + 1))
    console.print(table)
    console.print(_bill(summary["communication"]))
    rate = timing["client_updates_per_s"]
    console.print(
        f"time {duration(timing['wall_s'])} (training {duration(timing['training_s'])},"
        f" {0.0 if rate is None else rate:.1f} client updates/s)"
        + (f", {summary['failed_clients']} failed updates" if summary["failed_clients"] else ""),
        highlight=False,
    )
    simulation = summary.get("simulation")
    if simulation is not None:
        console.print(
            f"simulated time {duration(simulation['total_s'])},"
            f" {simulation['dropped_clients']} clients left or came too late",
            highlight=False,
        )
    console.print(f"run folder: {location}", highlight=False, soft_wrap=True)


def _metric(value: float | None) -> str:
    """Return a metric; JSON has no word for what is not finite."""
    return "not finite" if value is None else f"{value:.4f}"


def _bill(communication: Mapping[str, Any]) -> Table:
    table = Table("communication", "whole run", "after initiating")
    for column in table.columns[1:]:
        column.justify = "right"
    c = communication
    table.add_row("sent up", megabytes(c["bytes_up"]), "")
    table.add_row("sent down", megabytes(c["bytes_down"]), "")
    table.add_row("frozen base, sent as needed", megabytes(c["bytes_base"]), "")
    table.add_row("FedAvg would send", megabytes(c["fedavg_total_bytes"]), "")
    later, with_base = (
        c["reduction_vs_fedavg_after_initiating"],
        c["reduction_vs_fedavg_with_base_after_initiating"],
    )
    table.add_row("reduction against FedAvg", percent(c["reduction_vs_fedavg"]), percent(later))
    table.add_row(
        "the same with the base counted",
        percent(c["reduction_vs_fedavg_with_base"]),
        percent(with_base),
    )
    return table


@contextmanager
def watching_comparison(console: Console) -> Iterator[Callable[[Standing], None]]:
    """Show a comparison: a line for each run that has ended, and where the present one stands."""
    shown, told = 0, ("", 0)
    with console.status("starting") as line:

        def show(standing: Standing) -> None:
            nonlocal shown, told
            for ended in standing.ended[shown:]:
                console.print(_ended(ended), highlight=False, markup=False, soft_wrap=True)
            shown = len(standing.ended)
            cell = standing.running
            if cell is not None:
                seen = told[1] if told[0] == cell.location else 0
                for note in standing.status.notes[seen:]:
                    console.print(f"warning: {one_note(note)}", style="yellow", markup=False)
                told = (cell.location, len(standing.status.notes))
                at = f"run {shown + 1}/{standing.cells}: {cell.method}, seed {cell.seed}"
                line.update(f"{at}: {headline(standing.status)}")

        yield show


def _ended(ended: Ended) -> str:
    name = f"{ended.cell.method}, seed {ended.cell.seed}"
    if ended.error is not None:
        return f"{name}: failed: {ended.error}"
    return f"{name}: accuracy {ended.accuracy:.4f} in {duration(ended.seconds)}"


def show_comparison(console: Console, comparison: Comparison, location: str) -> None:
    """Print a comparison's methods, and where its tables are."""
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
    console.print("mean (standard deviation) over seeds; saved: bytes against FedAvg's")
    for row in comparison.runs[comparison.runs["error"].notna()].to_dict("records"):
        console.print(f"failed: {row['method']}, seed {row['seed']}: {row['error']}", markup=False)
    console.print(f"tables: {location}", highlight=False, soft_wrap=True)


def _mean(row: Mapping[Any, Any], name: str) -> str:
    spread = row[f"{name}_std"]
    shown = f"{row[f'{name}_mean']:.4f}"
    return shown if isnan(spread) else f"{shown} ({spread:.4f})"


@contextmanager
def watching_search(console: Console) -> Iterator[Callable[[SearchNews], None]]:
    """Show a search: a line for each trial that has ended, and how far the running ones are."""
    with console.status("starting") as line:

        def show(news: SearchNews) -> None:
            if news.warning is not None:
                console.print(f"warning: {one_note(news.warning)}", style="yellow", markup=False)
            if news.ended is not None:
                said = "trial {}: {}".format(*news.ended)
                console.print(said, highlight=False, markup=False, soft_wrap=True)
            rounds = ", ".join(str(done) for done in news.running.values())
            line.update(f"{len(news.running)} of {news.trials} trials running, rounds {rounds}")

        yield show


def show_search(
    console: Console, trials: pd.DataFrame, best: Mapping[str, str], location: str
) -> None:
    """Print the best trials of a search, and where its tables and recipes are.

    Args:
        console: where to.
        trials: rows of trials.parquet.
        best: trial by objective.
        location: of the search.
    """
    counts = trials["status"].value_counts()
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))
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
        console.print(f"failed: {row['trial']}: {row['error']}", markup=False)
    console.print(f"recipes, tables and report: {location}", highlight=False, soft_wrap=True)
