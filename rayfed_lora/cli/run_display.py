"""A run in the terminal: its progress, then its summary. Source: this project, on rich."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.federation.records import RoundRecord
from rayfed_lora.runs.status import Status, headline
from rayfed_lora.units import duration, megabytes, percent


@contextmanager
def watching(console: PlainConsole) -> Iterator[Callable[[Status], None]]:
    """Show a live bar, or plain lines without a terminal; yield the function to call."""
    if not console.is_terminal:
        yield _plain(console)
        return
    name = TextColumn("{task.description}", markup=False)
    detail = TextColumn("{task.fields[detail]}", markup=False)
    bar = BarColumn(bar_width=None)
    with Progress(name, bar, detail, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None, detail="")

        def show(status: Status) -> None:
            _print_news(console, status)
            total = None if status.phase == "starting" else status.rounds
            progress.update(task, description=headline(status), detail=_detail(status))
            progress.update(task, completed=status.rounds_trained, total=total)

        yield show


def _plain(console: PlainConsole) -> Callable[[Status], None]:
    phases: list[str] = []

    def show(status: Status) -> None:
        _print_news(console, status)
        if status.phase not in phases:
            phases.append(status.phase)
            if status.phase != "done":
                console.print_line(status.phase)

    return show


def _print_news(console: PlainConsole, status: Status) -> None:
    for note in status.notes:
        console.warn(note)
    for record in status.records:
        console.print_line(_round_line(record, status.rounds))


def _round_line(record: RoundRecord, rounds: int) -> str:
    """Return one line about a finished round."""
    width = len(str(rounds))
    rank = "full model" if record.rank is None else f"rank {record.rank:g}"
    tested = "" if record.accuracy is None else f"  accuracy {record.accuracy:.3f}"
    failed = f"  {record.failed_clients} failed" if record.failed_clients else ""
    dropped = f"  {record.dropped_clients} dropped" if record.dropped_clients else ""
    verdict = "" if record.proposal is None else f"  {record.proposal.verdict}"
    return (
        f"round {record.round + 1:{width}d}/{rounds}  {record.stage:<10}  {rank:<10}"
        f"  loss {record.train_loss:.3f}{tested}"
        f"  sent {megabytes(record.bytes_up + record.bytes_down):>9}"
        f"  {record.clients / record.seconds:5.1f} clients/s  {record.seconds:5.1f} s"
        f"{verdict}{failed}{dropped}"
    )


def _detail(status: Status) -> str:
    now = time.time()
    if status.training_since is None:
        return ""
    loss = "" if status.loss is None else f"loss {status.loss:.3f}  "
    accuracy = "" if status.accuracy is None else f"accuracy {status.accuracy:.3f}  "
    return (
        f"{loss}{accuracy}{status.clients_done}/{status.clients} clients"
        f"  {megabytes(status.bytes_total)} sent"
        f"  {status.clients_per_s(now):.1f} clients/s  ETA {duration(status.eta_s(now))}"
    )


def show_summary(console: PlainConsole, summary: Mapping[str, Any], location: str) -> None:
    """Print a finished run's metrics, its bill and its folder."""
    final, best, timing = summary["final"], summary["best"], summary["timing"]
    # Only language models have a perplexity.
    shown = ["accuracy", "loss"] + ["perplexity"] * (final["eval_perplexity"] is not None)
    table = Table("", *shown, "round", title=f"{summary['name']} ({summary['method']})")
    for name, row in (("final", final), ("best", best)):
        numbers = [_metric(row[f"eval_{metric}"]) for metric in shown]
        table.add_row(name, *numbers, str(row["round"] + 1))
    console.print(table)
    console.print(bill(summary["communication"]))
    rate = timing["client_updates_per_s"]
    console.print_line(
        f"time {duration(timing['wall_s'])} (training {duration(timing['training_s'])},"
        f" {0.0 if rate is None else rate:.1f} client updates/s)"
        + (f", {summary['failed_clients']} failed updates" if summary["failed_clients"] else "")
    )
    simulation = summary.get("simulation")
    if simulation is not None:
        console.print_line(
            f"simulated time {duration(simulation['total_s'])},"
            f" {simulation['dropped_clients']} clients left or came too late"
        )
    console.print_line(f"run folder: {location}")


def _metric(value: float | None) -> str:
    """Return a metric as text; summary.json has null for numbers that are not finite."""
    return "not finite" if value is None else f"{value:.4f}"


def bill(communication: Mapping[str, Any]) -> Table:
    """Return the table of a run's traffic, from summary.json or the ledger's totals."""
    table = Table("communication", "whole run", "after initiating")
    for column in table.columns[1:]:
        column.justify = "right"
    for text, key in (
        ("sent up", "bytes_up"),
        ("sent down", "bytes_down"),
        ("frozen base, sent as needed", "bytes_base"),
        ("FedAvg would send", "fedavg_total_bytes"),
    ):
        table.add_row(text, megabytes(communication[key]), "")
    for text, key in (
        ("reduction against FedAvg", "reduction_vs_fedavg"),
        ("the same with the base counted", "reduction_vs_fedavg_with_base"),
    ):
        later = communication[f"{key}_after_initiating"]
        table.add_row(text, percent(communication[key]), percent(later))
    return table
