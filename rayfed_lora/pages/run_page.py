"""The page of a run that ends now. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayfed_lora.storage import RunFolder


def run_page(folder: RunFolder, summary: Mapping[str, Any]) -> str:
    """Return the page of one run; `summary` is the content of summary.json, not written yet."""
    # Here: pandas and plotly would cost each run's start a second.
    from rayfed_lora.pages.report import report_html
    from rayfed_lora.runs.reading import read_run

    return report_html([read_run(folder, summary)])
