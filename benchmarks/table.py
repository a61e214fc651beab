"""Print the results of the side-by-side as the tables of README.md: `python table.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def cell(found: dict[str, float], digits: int) -> str:
    """Return median and range."""
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f}-{found['max']:.{digits}f})"


def table(result: dict[str, Any]) -> str:
    """Return one workload's tables: what was measured, and our share of each other runner's."""
    lines = [
        f"**{result['workload']}**, {result['repeats']} repeats",
        "",
        "| runner | clients/s | start-up s | wall s | peak MB |",
        "|---|---|---|---|---|",
    ]
    for name, found in result["runners"].items():
        shown = [cell(found["clients_per_s"], 1), cell(found["startup_s"], 1)]
        shown += [cell(found["wall_s"], 1), cell(found["peak_pss_mb"], 0)]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    keys = ("clients_per_s", "startup_s", "wall_s", "peak_pss_mb")
    lines += [
        "",
        "| ours by theirs | clients/s | start-up | wall | memory |",
        "|---|---|---|---|---|",
    ]
    for ours, others in result["ratios"].items():
        for name, ratios in others.items():
            shown = [cell(ratios[key], 2) for key in keys]
            lines.append(f"| {ours} / {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print all workloads."""
    for path in sorted(RESULTS.glob("W*.json")):
        print(table(json.loads(path.read_text())), end="\n\n")


if __name__ == "__main__":
    main()
