"""Does SA-FedLoRA beat FedAvg for 6.38 % of its bytes when it may use them for more rounds?

`python rounds_for_bytes.py --out DIR [--cells trec-0.1,...]` runs cell by cell (a data set at a
Dirichlet skew) and arm by arm, on one thread (set OMP_NUM_THREADS=1). SIGINT or SIGTERM stops it;
started again it continues, inside a run from the last checkpoint. `--status` says how far it is.

The budget is 6.38 % of what 20 rounds of FedAvg send up and down. Arms of a free length get as many
rounds as fit into it, at most 170. Each arm's learning rate is tuned on the tuning seeds, at a
quarter of its rounds (20 at least, where it has them) and by run.py's climb; the score is the mean
of a run's last three tests. No arm has a full-model stage: its initiating rate is its own.

In ../results/paper/:

* rounds-for-bytes-arms.json: rounds and bytes of each arm, as planned;
* rates-rounds-for-bytes.json: learning rates; an arm that has one is not tuned again;
* rounds-for-bytes-{tuning,runs}.csv: a row a run, on tuning seeds and on test seeds. `wall_s`
  includes pauses; `round_s` is the median over rounds; `simulated_{slow,fast}_s` are of the plan
  of the same recipe on SIMULATED devices and networks, with first downloads of the base;
* rounds-for-bytes-curves.csv: the tests of each run on a test seed, with the bytes sent so far.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pandas as pd
import run as paper

import rayfed_lora
from rayfed_lora.errors import InterruptedRunError, RunError
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe

ARMS_FILE = paper.RESULTS / "rounds-for-bytes-arms.json"
RATES_FILE = paper.RESULTS / "rates-rounds-for-bytes.json"
BUDGET = 1 - 0.9362
LENGTHS = range(5, 171)
# An arm's rate is tuned on a quarter of its rounds, but on no fewer than these where it has them:
# after five rounds of TREC, FedAvg is at 24 % with the rate that gives it 86 % after twenty.
TUNED_ROUNDS = 20
STAGES = ("initiating", "heating", "cooling", "holding")
# Devices that train 50 examples a second, on a slow and on a fast network.
SIMULATED = {
    "slow": {"clients.speed": 50.0, "network.up_mbps": 5.0, "network.down_mbps": 20.0},
    "fast": {"clients.speed": 50.0, "network.up_mbps": 100.0, "network.down_mbps": 100.0},
}


@dataclass(frozen=True)
class Arm:
    settings: paper.Variant
    rounds: int | None = None  # None: as many as fit into the budget
    stages: tuple[int, int, int, int] = (0, 0, 0, 1)  # to be stretched to the rounds
    cells: tuple[str, ...] = ()  # titles of those that have it; empty: all

    def lengths(self, rounds: int) -> dict[str, int]:
        """Return the stages' rounds: in proportion, at least one; the last takes what is left."""
        share = rounds / sum(self.stages)
        first = [max(round(own * share), min(own, 1)) for own in self.stages[:3]]
        stages = zip(STAGES, [*first, rounds - sum(first)], strict=True)
        return {f"annealing.{stage}.rounds": length for stage, length in stages}


FEDAVG: paper.Variant = {"method": "fedavg"}
FIXED: Mapping[int, paper.Variant] = {
    rank: {**paper.LORA, "method": "fedlora", paper.RANK: rank, paper.LOW_RANK: rank}
    for rank in (16, 4, 2, 1)
}
TO_4: paper.Variant = {**paper.ANNEALED, **paper.ADAPTER_ONLY}
TO_1: paper.Variant = {**TO_4, paper.LOW_RANK: 1, "annealing.cooling.shape": "exponential"}
# The schedule of run.py, and one that cools to rank 1 early and holds there: in 64 rounds
# 1 + 2 + 8 + 53, which keeps its proportions but for the initiating round, of which one is least.
STAGES_TO_4, STAGES_TO_1 = (1, 6, 8, 5), (1, 6, 20, 142)
# The ViT is small: annealed arms of 64 or 169 rounds are over the budget; shorter ones are added.
FASHION = ("fashion-0.1", "fashion-0.5")
# In the order of the queue: what decides the hypothesis comes first.
ARMS: Mapping[str, Arm] = {
    "fedavg-20": Arm(FEDAVG, 20),
    "sa-16-1-fit": Arm(TO_1, None, STAGES_TO_1, FASHION),
    "sa-16-1-long": Arm(TO_1, 169, STAGES_TO_1),
    "sa-16-4": Arm(TO_4, 64, STAGES_TO_4),
    "fixed-4": Arm(FIXED[4]),
    "fixed-4-64": Arm(FIXED[4], 64),
    "fixed-2": Arm(FIXED[2]),
    "fixed-1": Arm(FIXED[1]),
    "fixed-16": Arm(FIXED[16]),
    "ffa-16": Arm(paper.RULES["ffa-lora"]),
    "sa-16-1": Arm(TO_1, 64, STAGES_TO_1),
    "sa-16-4-fit": Arm(TO_4, None, STAGES_TO_4, FASHION),
    "fedavg-40": Arm(FEDAVG, 40),
    "fedavg-64": Arm(FEDAVG, 64, cells=("trec-0.1",)),
}


class Cell(NamedTuple):
    """A data set at a skew, with the test seeds, on which nothing is chosen."""

    title: str
    name: str
    alpha: float
    seeds: range


SEEDS = {"trec": range(200, 205), "fashion": range(200, 210), "vader": range(200, 205)}
KEYS = [(f"{name}-{alpha}", name, alpha) for alpha in (0.1, 0.5) for name in SEEDS]
CELLS = {title: Cell(title, name, alpha, SEEDS[name]) for title, name, alpha in KEYS}


@dataclass(frozen=True)
class Run:
    cell: Cell
    arm: str
    rounds: int
    lr: float
    seed: int

    def recipe(self, simulated: Mapping[str, float] | None = None) -> Recipe:
        """Return its recipe, where asked for with keys of simulated devices."""
        cell, arm = self.cell, ARMS[self.arm]
        settings = {
            **arm.settings,
            **arm.lengths(self.rounds),
            **(paper.SKEWED[cell.name] if cell.alpha < paper.ALPHAS[0] else {}),
            "data.partition.alpha": cell.alpha,
            paper.LR: self.lr,
            "seed": self.seed,
            "evaluation.every": 4,
            "runtime.executor": "local",
            "runtime.client_actors": 1,
            "storage.checkpoint_every": 5,
            **(simulated or {}),
        }
        return load_recipe(str(paper.HERE / f"{cell.name}.yaml"), settings)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, content: Mapping[str, Any]) -> None:
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def planned_arms(cell: Cell) -> dict[str, dict[str, int]]:
    """Return rounds and bytes of a cell's arms; plan those not known yet."""
    kept = read(ARMS_FILE)

    def sent(name: str, rounds: int) -> int:
        run = Run(cell, name, rounds, paper.START, paper.TUNING_SEEDS[0])
        return int(rayfed_lora.plan(run.recipe()).totals.communication()["total_bytes"] or 0)

    if cell.title not in kept:
        kept[cell.title] = {}
        budget = BUDGET * sent("fedavg-20", 20)
        for name, arm in ARMS.items():
            if cell.title in (arm.cells or CELLS):
                fitting = partial(sent, name)
                rounds = arm.rounds or LENGTHS[bisect_right(LENGTHS, budget, key=fitting) - 1]
                kept[cell.title][name] = {"rounds": rounds, "bytes": sent(name, rounds)}
        write(ARMS_FILE, kept)
    return dict(kept[cell.title])


def record_of(run: Run, result: rayfed_lora.Result) -> dict[str, Any]:
    """Return what the tables say of a finished run: its row, and its curve."""
    rounds, summary, simulated = result.rounds, result.summary, {}
    for name, settings in SIMULATED.items():
        planned = rayfed_lora.plan(run.recipe(settings)).rounds
        simulated[f"simulated_{name}_s"] = sum(each.simulated_s or 0.0 for each in planned)
    sent = (rounds["bytes_up"] + rounds["bytes_down"]).cumsum()
    tests = rounds.assign(round=rounds["round"] + 1, bytes=sent).dropna(subset="eval_accuracy")
    updates = int((rounds["clients"] - rounds["failed_clients"]).sum())
    row = {
        **{key: summary["communication"][key] for key in ("bytes_up", "bytes_down", "bytes_base")},
        "total_mb": summary["communication"]["total_bytes"] / 1e6,
        "final_accuracy": summary["final"]["eval_accuracy"],
        "last3_accuracy": tests["eval_accuracy"].tail(3).mean(),
        "final_loss": summary["final"]["eval_loss"],
        "client_updates": updates,
        "local_steps": updates * (run.recipe().clients.steps or 0),
        "wall_s": summary["timing"]["wall_s"],
        "round_s": rounds["seconds"].median(),
        **simulated,
        "adapter_sha256": summary["adapter_sha256"],
        "versions": "; ".join(f"{name} {found}" for name, found in summary["versions"].items()),
    }
    curve = tests[["round", "bytes", "eval_accuracy", "eval_loss"]]
    return {"row": row, "curve": curve.to_dict("records")}


def finished(run: Run, out: Path) -> dict[str, Any]:
    """Return the row of a run, after running what is left of it; its weights are not kept."""
    label = f"rounds-{run.rounds}-lr-{run.lr:g}-seed-{run.seed}"
    folder = out / run.cell.title / run.arm / label
    path = folder.with_name(f"{label}.json")
    if not path.exists():
        print(f"{pd.Timestamp.now():%m-%d %H:%M} {folder.relative_to(out)}", flush=True)
        try:
            record = record_of(run, rayfed_lora.run(run.recipe(), str(folder), resume=True))
        except RunError as error:
            # At such a rate no client sends anything finite: a score of 0.
            record = {"row": {"last3_accuracy": 0.0, "error": str(error)}, "curve": []}
        own = {"set": run.cell.name, "alpha": run.cell.alpha, "arm": run.arm, "seed": run.seed}
        row = {**own, "lr": run.lr, "rounds": run.rounds, **record["row"]}
        describe = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]
        row["commit"] = subprocess.check_output(describe, cwd=paper.HERE, text=True).strip()
        write(path, {"row": row, "curve": [{**own, **point} for point in record["curve"]]})
        save_tables(out)
    for part in ("adapter", "base", "checkpoints"):
        shutil.rmtree(folder / part, ignore_errors=True)
    return dict(read(path)["row"])


def save_tables(out: Path) -> None:
    """Write the tables of all finished runs, figures in full."""
    tables: dict[str, list[Any]] = {"tuning": [], "runs": [], "curves": []}
    for cell in CELLS.values():
        for path in sorted((out / cell.title).glob("*/*.json")):
            record = read(path)
            row, fedavg = record["row"], planned_arms(cell)["fedavg-20"]["bytes"]
            share = row["total_mb"] * 1e6 / fedavg if "total_mb" in row else None
            tuned = row["seed"] in paper.TUNING_SEEDS
            tables["tuning" if tuned else "runs"].append({**row, "share_of_fedavg_20": share})
            tables["curves"] += [] if tuned else record["curve"]
    for name, rows in tables.items():
        if rows:
            paper.save(pd.DataFrame(rows, dtype=object), f"rounds-for-bytes-{name}")


def rate(cell: Cell, arm: str, rounds: int, out: Path) -> float:
    """Return an arm's learning rate; tune it where it is not known yet."""
    kept = read(RATES_FILE)
    if arm not in kept.get(cell.title, {}):
        start = paper.START_SKEWED if cell.alpha < paper.ALPHAS[0] else paper.START
        start = paper.START_FULL if ARMS[arm].settings is FEDAVG else start
        short = min(rounds, max(round(rounds / 4), TUNED_ROUNDS))
        scores: dict[float, float] = {}
        while (lr := paper.next_rate(scores, start)) is not None:
            runs = [Run(cell, arm, short, lr, seed) for seed in paper.TUNING_SEEDS]
            scores[lr] = fmean(finished(run, out)["last3_accuracy"] for run in runs)
        kept.setdefault(cell.title, {})[arm] = max(scores, key=scores.__getitem__)
        write(RATES_FILE, kept)
    return float(kept[cell.title][arm])


def show_status(cell: Cell, out: Path) -> None:
    """Print what is done of a cell, and the hours left if an arm's tuning takes eight runs."""
    arms, rates, whole_h = planned_arms(cell), read(RATES_FILE).get(cell.title, {}), 0.0
    rows = [read(path)["row"] for path in (out / cell.title).glob("*/*.json")]
    print(f"{cell.title:14}rounds      MB  of FedAvg-20    rate  tuning  tests  hours left")
    for name, planned in arms.items():
        rounds, sent = planned["rounds"], planned["bytes"]
        own = [row["seed"] in cell.seeds for row in rows if row["arm"] == name]
        tests, tuned = sum(own), own.count(False)
        alike = [row for row in rows if ("fedavg" in row["arm"]) == ("fedavg" in name)]
        timed = [row["wall_s"] / row["rounds"] for row in alike if "wall_s" in row]
        left = len(cell.seeds) - tests + (0 if name in rates else max(8 - tuned, 1) / 4)
        left_h = left * rounds * fmean(timed or [8.0]) / 3600
        whole_h += left_h
        share, lr = sent / arms["fedavg-20"]["bytes"], str(rates.get(name, "-"))
        print(f"  {name:12}{rounds:6}{sent / 1e6:8.0f}{share:14.2%}{lr:>8}{tuned:8}", end="")
        print(f"{tests:4}/{len(cell.seeds):<2}{left_h:12.1f}")
    print(f"  {len(rows)} runs done, about {whole_h:.1f} hours left\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--status", action="store_true", help="of the cells begun; runs nothing")
    args = parser.parse_args()
    cells = [CELLS[title] for title in args.cells.split(",")]
    if args.status:
        for cell in (cell for cell in cells if cell.title in read(ARMS_FILE)):
            show_status(cell, args.out)
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        save_tables(args.out)
        for cell in cells:
            for arm, planned in planned_arms(cell).items():
                lr = rate(cell, arm, planned["rounds"], args.out)
                for seed in cell.seeds:
                    finished(Run(cell, arm, planned["rounds"], lr, seed), args.out)
    except (InterruptedRunError, KeyboardInterrupt) as stop:
        raise SystemExit(f"stopped; start it again to continue ({stop})") from stop


if __name__ == "__main__":
    main()
