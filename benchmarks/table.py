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
    """Return one workload's table."""
    lines = [
        f"**{result['workload']}**, {result['repeats']} repeats",
        "",
        "| runner | clients/s | start-up s | wall s | peak MB | ours: times the clients/s"
        " | ours: share of its wall | ours: share of its memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in result["runners"].items():
        ratios = result["ratios"].get(name)
        shown = [cell(found["clients_per_s"], 1), cell(found["startup_s"], 1)]
        shown += [cell(found["wall_s"], 1), cell(found["peak_pss_mb"], 0)]
        keys = ("clients_per_s", "wall_s", "peak_pss_mb")
        shown += [cell(ratios[key], 2) for key in keys] if ratios else ["", "", ""]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print all workloads."""
    for path in sorted(RESULTS.glob("W*.json")):
        print(table(json.loads(path.read_text())), end="\n\n")


if __name__ == "__main__":
    main()
