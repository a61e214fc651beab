"""How a round's cost grows with the cohort and the population: the real Ray path, fake training.

`python scale.py [--rounds 3]` runs cohorts of 1,000 to 100,000 clients out of up to 1,000,000, with
trainers that only add to what they got, and writes results/scale.json: seconds a round, CPU seconds
of the server actor and its memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

import rayfed_lora
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tasks.messages import Evaluate, Export, Initial, TestClients, Train
from rayfed_lora.tasks.training import BlockUpdate, trained
from rayfed_lora.types import (
    AdapterState,
    ClientReport,
    Factors,
    ModelShape,
    ModuleShape,
    Predictions,
)

if TYPE_CHECKING:
    from rayfed_lora.data.workload import Workload

# The adapted modules of the workload W: query and value of four layers, 64 x 64.
SHAPE = ModelShape(
    modules={f"layer.{i}.{part}": ModuleShape(64, 64) for i in range(4) for part in "qv"},
    head_params=650,
    total_params=140_000,
    head=("head",),
    linear_flops=1e5,
    activation_bytes=10_000,
)
EXAMPLES = 2


class AddingTrainer:
    """Adds a little to every value; no arithmetic to speak of."""

    def shape(self) -> ModelShape:
        return SHAPE

    def run(self, task: Any) -> Any:
        if isinstance(task, Train):
            return trained(task, partial(self._train_block, task))
        if isinstance(task, Evaluate):
            return tuple(self._predict(rows) for rows in task.shards)
        if isinstance(task, TestClients):
            return ()
        if isinstance(task, Export):
            return {}
        if isinstance(task, Initial):
            return {"head": np.zeros((10, 65), np.float32)}
        raise TypeError(f"expected a task of rayfed_lora.tasks, got {type(task).__name__}")

    def _train_block(
        self, task: Train, clients: Sequence[int], starts: Sequence[AdapterState]
    ) -> BlockUpdate:
        reports, states = [], []
        for client, state in zip(clients, starts, strict=True):
            move = np.float32(client % 7)
            moved = {n: Factors(f.a + move, f.b + move, f.scale) for n, f in state.factors.items()}
            dense = {name: tensor + move for name, tensor in state.dense.items()}
            reports.append(ClientReport(client, EXAMPLES, train_loss=1.0, seconds=0.0))
            states.append(AdapterState(moved, dense))
        return BlockUpdate(tuple(reports), states)

    def _predict(self, rows: slice) -> Predictions:
        ones = np.ones(rows.stop - rows.start, np.int64)
        return Predictions(ones, ones.astype(np.float32), ones, ones, ones)


class AddingFactory:
    """Makes adding trainers for a population that is two arrays."""

    def load(self, recipe: Recipe) -> None:
        """Import nothing."""

    def workload(self, recipe: Recipe) -> Workload:
        from rayfed_lora.data.client_table import ClientTable
        from rayfed_lora.data.examples import Examples
        from rayfed_lora.data.workload import Workload

        clients = recipe.data.partition.clients
        rows = Examples.of({"pixel_values": np.zeros((8, 1), np.float32)}, np.zeros(8, np.int64))
        offsets = np.arange(clients + 1, dtype=np.int64) * EXAMPLES
        table = ClientTable(np.zeros(clients * EXAMPLES, np.int64), offsets)
        return Workload(rows, rows, rows, table, ("no", "yes"), {"model_type": "vit"})

    def weights(self, recipe: Recipe, workload: Workload) -> dict[str, np.ndarray]:
        return {}

    def trainer(self, recipe: Recipe, workload: Workload, weights: Any, device: str) -> Any:
        return AddingTrainer()


class ServerWatch:
    """CPU seconds and peak memory of the server actor's process."""

    def __init__(self) -> None:
        self.cpu_s, self.peak_bytes = 0.0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        found: psutil.Process | None = None
        while not self._stop.wait(0.2):
            try:
                if found is None:
                    titles = (p for p in psutil.process_iter() if "SimulationServer" in title(p))
                    found = next(titles, None)
                    continue
                times = found.cpu_times()
                self.cpu_s = times.user + times.system
                self.peak_bytes = max(self.peak_bytes, found.memory_info().rss)
            except psutil.NoSuchProcess:
                found = None

    def stop(self) -> None:
        """End the watch."""
        self._stop.set()
        self._thread.join()


def title(process: psutil.Process) -> str:
    """Return a process's title, empty where it is gone."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def measure(population: int, cohort: int, rounds: int) -> dict[str, Any]:
    """Run some rounds; return what they cost."""
    none = {"rounds": 0}
    recipe = {
        "name": "scale",
        "method": "fedlora",
        "data": {"partition": {"clients": population}},
        "model": {"config": {"architecture": "vit"}},
        "annealing": {
            "initiating": none,
            "heating": {"rounds": rounds, "rank": 8},
            "cooling": none,
            "holding": none,
        },
        "clients": {"per_round": cohort},
        "runtime": {"device": "cpu"},
        "storage": {"checkpoint_every": rounds},
    }
    watch = ServerWatch()
    try:
        with tempfile.TemporaryDirectory() as folder:
            began = time.time()
            result = rayfed_lora.run(recipe, out=f"{folder}/run", factory=AddingFactory())
            wall_s = time.time() - began
            seconds = result.rounds["seconds"].tolist()
    finally:
        watch.stop()
    found = {
        "population": population,
        "cohort": cohort,
        "round_s": seconds,
        "client_updates_per_s": cohort / float(np.median(seconds)),
        "wall_s": wall_s,
        "server_cpu_s": watch.cpu_s,
        "server_peak_mb": watch.peak_bytes / 1e6,
    }
    print({key: value for key, value in found.items() if key != "round_s"}, flush=True)
    return found


def main() -> None:
    """Measure each size and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "scale.json"))
    args = parser.parse_args()
    sizes = [(10_000, 1_000), (1_000_000, 1_000), (1_000_000, 10_000), (1_000_000, 100_000)]
    found = [measure(population, cohort, args.rounds) for population, cohort in sizes]
    found.append(measure(1_000_000, 10_000, 4 * args.rounds))
    Path(args.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
