"""A run in the terminal: its progress, then its summary. Source: this project, on rich."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rayfed_lora.cli.console import PlainConsole, fitted
from rayfed_lora.cli.next_steps import after_run
from rayfed_lora.units import duration, megabytes, percent

if TYPE_CHECKING:
    from rayfed_lora.federation.records import RoundRecord
    from rayfed_lora.runs.status import Status

# Columns of a terminal that the bar and the elapsed time take.
_BAR = 22


@contextmanager
def watching(console: PlainConsole, location: str = "") -> Iterator[Callable[[Status], None]]:
    """Show a live bar, or plain lines without a terminal; yield the function to call.

    Its first call prints the run folder `location`.
    """
    if not console.is_terminal:
        yield _plain(console, location)
        return
    name = TextColumn("{task.description}", markup=False)
    detail = TextColumn("{task.fields[detail]}", markup=False)
    bar = BarColumn(bar_width=None)
    with Progress(
        name, bar, TimeElapsedColumn(), detail, console=console, transient=True, expand=True
    ) as progress:
        task = progress.add_task("importing", total=None, detail="")
        told: list[Status] = []

        def show(status: Status) -> None:
            from rayfed_lora.runs.status import headline

            _print_news(console, status, "" if told else location)
            told[:] = [status]
            total = None if status.phase == "starting" else status.rounds
            text = headline(status)
            detail = _detail(status, console.width - len(text) - _BAR)
            progress.update(task, description=text, detail=detail)
            progress.update(task, completed=status.rounds_trained, total=total)

        yield show


def _plain(console: PlainConsole, location: str) -> Callable[[Status], None]:
    began, told = time.monotonic(), list[str]()

    def show(status: Status) -> None:
        from rayfed_lora.runs.status import headline

        _print_news(console, status, "" if told else location)
        text = headline(status) if status.phase == "starting" else status.phase
        if text not in told:
            told.append(text)
            if text != "done":
                console.print_line(f"{duration(time.monotonic() - began)} {text}")

    return show


def _print_news(console: PlainConsole, status: Status, location: str) -> None:
    if location:
        console.print_facts({"run folder": location})
    for note in status.notes:
        console.warn(note)
    for record in status.records:
        for line in _round_lines(record, status.rounds, console.width):
            console.print_line(line)


def _round_lines(record: RoundRecord, rounds: int, width: int) -> Iterator[str]:
    """Yield a line about a finished round, of at most `width` columns, and one of remarks."""
    number = f"{record.round + 1:{len(str(rounds))}d}/{rounds}"
    rank = "full" if record.rank is None else f"rank {record.rank:.3g}"
    loss, accuracy = record.evaluation.get("loss"), record.accuracy
    parts = [
        (0, f"round {number}  {record.stage:<10} {rank:<9}  train loss {record.train_loss:.3f}"),
        (0, "" if accuracy is None else f"test accuracy {accuracy:.3f}"),
        (3, "" if loss is None else f"test loss {loss:.3f}"),
        (2, f"sent in round {megabytes(record.bytes_up + record.bytes_down):>9}"),
        (4, f"{record.clients / record.seconds:5.1f} clients/s"),
        (1, duration(record.seconds)),
    ]
    counts = {"failed": record.failed_clients, "dropped": record.dropped_clients}
    remarks = [f"{count} {what}" for what, count in counts.items() if count]
    verdict = None if record.proposal is None else record.proposal.verdict
    if verdict == "accepted":
        parts.append((5, verdict))
    elif verdict is not None:
        remarks.insert(0, verdict)
    line, rest = fitted(width, [part for part in parts if part[1]]), "  ".join(remarks)
    if len(line) + 2 + len(rest) <= width:
        yield f"{line}  {rest}".rstrip()
    else:
        yield from (line, f"    {rest}")


def _detail(status: Status, width: int) -> str:
    if status.training_since is None or status.phase != "training":
        return ""
    now = time.time()
    parts = [
        (4, "" if status.loss is None else f"train loss {status.loss:.3f}"),
        (4, "" if status.accuracy is None else f"test accuracy {status.accuracy:.3f}"),
        (1, f"{status.clients_done}/{status.clients} clients"),
        (2, f"{megabytes(status.bytes_total)} sent in total"),
        (3, f"{status.clients_per_s(now):.1f} clients/s"),
        (0, f"ETA {duration(status.eta_s(now))}"),
    ]
    return fitted(width, [part for part in parts if part[1]])


def show_summary(
    console: PlainConsole,
    summary: Mapping[str, Any],
    location: str,
    harness: Mapping[str, Any] | None = None,
) -> None:
    """Print a finished run's metrics, its bill, its folder, and the next command.

    `harness` has the metrics by task of lm-evaluation-harness, if any.
    """
    from rayfed_lora.runs.outcome import ending, kept_model

    final, best, timing = summary["final"], summary["best"], summary["timing"]
    console.print_line(f"{summary['name']} ({summary['method']}, seed {summary['seed']})")
    # Only language models have a perplexity.
    shown = ["accuracy", "loss"] + ["perplexity"] * (final["eval_perplexity"] is not None)
    rows = []
    named = [("last test", final), ("best test accuracy", best)]
    if "kept" in summary:
        named.append(("exported", summary["kept"]))
    for name, row in named:
        numbers = {f"test {metric}": _metric(row[f"eval_{metric}"]) for metric in shown}
        loss = {"train loss": _metric(row["train_loss"])}
        rows.append({"model": f"{name}, round {row['round'] + 1}", **numbers, **loss})
    console.print_rows(rows, optional=("train loss", "test perplexity"))
    if "generation" in summary:
        console.print_rows(answer_rows(summary["generation"]))
    if harness:
        console.print_rows(harness_rows(harness))
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
    facts = {"exported": kept_model(summary), "stopped by": ending(summary)}
    console.print_facts({key: text for key, text in facts.items() if text is not None})
    console.print_facts(after_run(location))


def answer_rows(generation: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a table of answers to prompts: of all, by domain or client, beside the base's."""
    base = generation.get("base")
    groups = "by_domain" if "by_domain" in generation else "by_client"
    named = [("all", generation, base)]
    for name, own in generation.get(groups, {}).items():
        named.append((name, own, None if base is None else base[groups][name]))
    rows = []
    for name, own, before in named:
        row = {"answers": name, "prompts": str(own["examples"])}
        for key, title in (("exact_match", "exact match"), ("rouge_l", "ROUGE-L")):
            row[title] = f"{own[key]:.3f}"
            if before is not None:
                row[f"{title} of the base"] = f"{before[key]:.3f}"
        rows.append(row)
    return rows


def harness_rows(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a table of metrics by task of lm-evaluation-harness; counts stay whole numbers."""
    return [
        {
            "task": task,
            "metric": name,
            "value": f"{value:.4f}" if isinstance(value, float) else f"{value}",
        }
        for task, values in found.items()
        for name, value in values.items()
        if name not in ("limit", "few_shot", "chat_template")
    ]


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
        ("FedAvg under the same codecs", "fedavg_total_bytes_same_codec"),
    ):
        # Without codecs it is the same; older runs do not have it.
        value = communication.get(key, communication["fedavg_total_bytes"])
        if key == "fedavg_total_bytes_same_codec" and value == communication["fedavg_total_bytes"]:
            continue
        table.add_row(text, megabytes(value), "")
    for text, key in (
        ("reduction against FedAvg", "reduction_vs_fedavg"),
        ("the same with the base counted", "reduction_vs_fedavg_with_base"),
    ):
        later = communication[f"{key}_after_initiating"]
        table.add_row(text, percent(communication[key]), percent(later))
    plain = communication["reduction_vs_fedavg"]
    encoded = communication.get("reduction_vs_fedavg_same_codec", plain)
    if encoded != plain:
        table.add_row("against FedAvg under the same codecs", percent(encoded), "")
    return table
