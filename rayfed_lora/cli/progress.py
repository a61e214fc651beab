"""A run in the terminal: a live bar, or plain lines where there is no terminal.

Source: this project, on rich.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from rayfed_lora.federation.records import RoundRecord
from rayfed_lora.printable import one_note
from rayfed_lora.runs.status import Status, headline
from rayfed_lora.units import duration, megabytes


def round_line(record: RoundRecord, rounds: int) -> str:
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


@contextmanager
def watching(console: Console) -> Iterator[Callable[[Status], None]]:
    """Show a run on a console; yields the function to call with each status."""
    if not console.is_terminal:
        yield _plain(console)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None, detail="")

        def show(status: Status) -> None:
            _print_news(console, status)
            total = None if status.phase == "starting" else status.rounds
            progress.update(
                task,
                description=headline(status),
                completed=status.rounds_trained,
                total=total,
                detail=_detail(status),
            )

        yield show


def _plain(console: Console) -> Callable[[Status], None]:
    phases: list[str] = []

    def show(status: Status) -> None:
        _print_news(console, status)
        if status.phase not in phases:
            phases.append(status.phase)
            if status.phase != "done":
                console.print(status.phase, highlight=False)

    return show


def _print_news(console: Console, status: Status) -> None:
    for note in status.notes:
        console.print(
            f"warning: {one_note(note)}",
            style="yellow",
            highlight=False,
            markup=False,
        )
    for record in status.records:
        console.print(round_line(record, status.rounds), highlight=False, soft_wrap=True)


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
