"""The communication of a run, planned or measured, as a table. Source: this project, on rich."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from rayfed_lora.units import megabytes, percent


def bill(communication: Mapping[str, Any]) -> Table:
    """Return the table of a run's traffic.

    Args:
        communication: of summary.json, or of the ledger's totals.
    """
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
