"""A run in the terminal: a live bar, or plain lines where there is no terminal.

Source: this project, on rich.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from rayfed_lora.printable import one_note
from rayfed_lora.reporting.status import Status
from rayfed_lora.types import RoundRecord


def megabytes(count: float) -> str:
    """Return a number of bytes in a readable unit (powers of 1000).

    >>> megabytes(1_234_567), megabytes(12), megabytes(2.5e9)
    ('1.23 MB', '12 B', '2.50 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def percent(share: float | None) -> str:
    """Return a share in percent, `-` where there is none.

    >>> percent(0.9362), percent(None)
    ('93.62 %', '-')
    """
    return "-" if share is None else f"{100 * share:.2f} %"


def duration(seconds: float | None) -> str:
    """Return seconds as m:ss or h:mm:ss, `-:--` where unknown.

    >>> duration(75), duration(3675), duration(None)
    ('1:15', '1:01:15', '-:--')
    """
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def round_line(record: RoundRecord, rounds: int) -> str:
    """Return one line about a finished round."""
    width = len(str(rounds))
    rank = "full model" if record.rank is None else f"rank {record.rank:g}"
    tested = "" if record.eval_accuracy is None else f"  accuracy {record.eval_accuracy:.3f}"
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


def headline(status: Status) -> str:
    """Return in a few words what a run is doing."""
    if status.phase != "training":
        return status.phase
    rank = "full model" if status.rank is None else f"rank {status.rank}"
    return f"round {status.running}/{status.rounds} {status.stage} {rank}"


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
